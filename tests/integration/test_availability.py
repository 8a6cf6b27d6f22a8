"""Rankings at times: unavailable items are left out, of given candidates with a warning, in every way to rank."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import collm_dist
from collm_dist import RankingRequest
from collm_dist.config.loader import load_config
from collm_dist.errors import ArtifactError
from collm_dist.orchestration import batch_ranking as scoring
from collm_dist.runs.atomic_files import compute_file_hash, write_json
from collm_dist.runs.damage import read_json_file
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.finished_run import build_recommender, check_settings
from collm_dist.serving.item_index import ItemIndex
from collm_dist.serving.model_card import Licences
from collm_dist.serving.requests import RankingQuery
from collm_dist.serving.run_follower import load_served_run
from tests.integration.test_score_candidates import prepare, write_requests

LIKED, CANDIDATES = ["3", "17", "40"], [str(number) for number in range(41, 47)]
START, END = 2_000_000_000, 2_000_000_100
COMING, GONE = ["41", "50"], ["42", "43", "51"]


def add_windows(run, starts, ends):
    """Write windows of items, seconds by raw id, into the data of a run."""
    path = run / "data" / "items.parquet"
    table = pq.read_table(path)
    ids = table.column("item_id").to_pylist()
    for name, times in (("available_from", starts), ("available_until", ends)):
        table = table.append_column(name, pa.array([times.get(item_id) for item_id in ids], pa.int64()))
    path.unlink()
    pq.write_table(table, path)
    manifest = RunDir(run).read_record("data")
    tables = manifest["tables"] | {"items.parquet": compute_file_hash(path)}
    RunDir(run).write_record("data", manifest | {"tables": tables})


@pytest.fixture(scope="module")
def run_with_windows(finished_run, tmp_path_factory):
    """Copy of the tiny run in which items are available from, or until, certain seconds."""
    run = shutil.copytree(finished_run, tmp_path_factory.mktemp("windows") / "run")
    add_windows(run, dict.fromkeys(COMING, START), dict.fromkeys(GONE, END))
    return run


@pytest.fixture(scope="module")
def build(run_with_windows):
    """Function that returns the recommender whose clock stands still at a time."""
    config = check_settings(load_config(run_with_windows / "config.yaml"), RunDir(run_with_windows))
    return lambda now: build_recommender(config, RunDir(run_with_windows), "cpu", now=now)


def list_ids(ranking):
    return [item.item_id for item in ranking]


def test_given_candidates_are_left_out_with_a_warning(recommender, build):
    everything = recommender.rank(LIKED, CANDIDATES)
    windowed = build(END)
    ranked = windowed.rank(LIKED, CANDIDATES)
    assert list_ids(ranked) == [item_id for item_id in list_ids(everything) if item_id not in GONE]
    assert ranked.warnings == [
        "candidates: 2 of 6 items are not available at 2033-05-18 03:35:00 (UTC) and are left out ('42', '43')"
    ]
    for as_of, missing in ((START - 1, {"41"}), (START, set()), (END - 1, set()), (END, {"42", "43"})):
        assert set(CANDIDATES) - set(list_ids(windowed.rank(LIKED, CANDIDATES, as_of=as_of))) == missing
    none = windowed.rank(LIKED, GONE)
    assert (none, len(none.warnings)) == ([], 1)
    compared = windowed.compare(RankingQuery(history=LIKED, candidates=CANDIDATES))
    assert (compared.num_candidates, compared.warnings) == (4, ranked.warnings)
    history = windowed.rank(["42"], ["44"])  # an event on an unavailable item is still history
    assert (list_ids(history), history.warnings) == (["44"], [])
    assert len(windowed.score([RankingRequest(None, LIKED, CANDIDATES)])[0]) == 6


@pytest.mark.parametrize("exact_below", [10**6, 10])
def test_unavailable_items_are_not_retrieved(recommender, build, monkeypatch, exact_below):
    """Also by an index of cells, which is built for the few items of this run."""
    if exact_below == 10:
        pytest.importorskip("faiss", reason="needs pip install 'collm-dist[retrieval]'")
        init = ItemIndex.__init__
        monkeypatch.setattr(ItemIndex, "__init__", lambda self, *of: init(self, *of, exact_below=exact_below))
    windowed, request = build(END), RankingRequest(None, LIKED)
    assert windowed.has_windows
    assert not recommender.has_windows
    (everything,) = recommender.retrieve([request], 1000)
    for as_of, missing in ((None, GONE), (START - 1, COMING)):
        (found,) = windowed.retrieve([RankingRequest(None, LIKED, as_of=as_of)], 1000)
        (expected,) = recommender.retrieve([RankingRequest(None, LIKED, as_of=as_of)], 1000)
        assert found == [item_id for item_id in expected if item_id not in missing]
    assert windowed.retrieve([RankingRequest(None, LIKED, allowed=["42", "44"])], 9) == [["44"]]
    assert set(list_ids(windowed.rank(LIKED, num_retrieved=1000))) == set(everything) - set(GONE)
    compared = windowed.compare(RankingQuery(history=LIKED, num_retrieved=1000))
    assert {item.item_id for item in compared.items} == set(everything) - set(GONE)


def test_a_file_is_ranked_at_the_time_when_its_job_began(run_with_windows, tmp_path):
    row = {"labels": None, "history": LIKED, "as_of": None}
    rows = [
        {**row, "user_id": "a", "candidates": CANDIDATES, "labels": [1, 1, 0, 0, 1, 0]},
        {**row, "user_id": "b", "candidates": GONE, "labels": [0] * (len(GONE) - 1) + [1]},
        {**row, "user_id": "c", "candidates": GONE, "as_of": START},
    ]
    source = write_requests(tmp_path / "users.parquet", rows)
    folder, _ = prepare(run_with_windows, source, tmp_path / "out")
    began = scoring.read_now(folder)
    prepare(run_with_windows, source, tmp_path / "out")
    assert scoring.read_now(folder) == began > 1_700_000_000
    write_json(folder.plan, read_json_file(folder.plan, remedy="") | {"now": END})
    config = check_settings(load_config(run_with_windows / "config.yaml"), RunDir(run_with_windows))
    assert scoring._PartScorer(config, RunDir(run_with_windows), folder, None).score(0) == 3
    record = folder.read_record(0)
    table = pq.read_table(folder.scores(0)).to_pydict()
    assert table["user_id"] == ["a"] * 4 + ["c"] * 3
    assert not set(table["item_id"][:4]) & set(GONE)
    assert (record["judged_users"], record["recall"]) == (2, pytest.approx(2 / 3))  # of 3 likes 2, and of 1 none
    assert {record[name]["users"] for name in record if name.startswith("ndcg@")} == {1}
    summary = scoring._summarize([record]) | {"seconds": 1.0, "actors": 1}
    assert summary["recall"] == pytest.approx(1 / 3)
    assert scoring.describe_summary(summary, folder)[2:4] == [
        "WARNING: 5 candidates of 2 users were not available at as_of, or when the job began, and are left out",
        "WARNING: 1 users have no candidates, so no rows",
    ]
    other = shutil.copytree(run_with_windows, tmp_path / "run")
    path = other / "data" / "items.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["available_from", "available_until"]), path)
    add_windows(other, {}, {})
    with pytest.raises(ArtifactError, match=r"other inputs:\n  items: "):
        prepare(other, source, tmp_path / "out")


def test_a_service_starts_although_nothing_is_available(run_with_windows, build):
    windowed = build(END)
    none = np.zeros(len(windowed.item_ids), dtype=bool)
    windowed._offered.find = lambda as_of: none
    assert load_served_run(RunDir(run_with_windows), lambda run_dir: windowed).recommender is windowed
    assert windowed.rank(LIKED) == []


def test_an_export_without_events_keeps_the_windows(run_with_windows, tmp_path):
    config, licences = load_config(run_with_windows / "config.yaml"), Licences("mit", "mit", "made up")
    export_model(config, RunDir(run_with_windows), tmp_path / "exported", licences, with_events=False)
    imported = collm_dist.load_recommender(import_model(tmp_path / "exported", RunDir(tmp_path / "run")).path, "cpu")
    (found,) = imported.retrieve([RankingRequest(None, LIKED, as_of=END)], 1000)
    assert set(imported.item_ids) - set(found) == {*LIKED, *GONE}
