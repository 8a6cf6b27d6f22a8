"""Ranking of a file of users: by the command, in parts, after an interruption, with invalid input."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collm_dist import RankingRequest
from collm_dist.config.loader import load_config
from collm_dist.data.shards.interactions import load_interactions, load_item_table, load_user_ids
from collm_dist.errors import ArtifactError, RequestError
from collm_dist.metrics import compute_ndcg
from collm_dist.orchestration import batch_ranking as scoring
from collm_dist.orchestration.batch_ranking import score_candidates
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.part_scoring import OutputFolder, score_part
from collm_dist.serving.request_files import read_part, write_parts

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5  # float32 sums in another order


def write_requests(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def rows(finished_run):
    """Ten users of the log with their last ratings and labels, and two new users."""
    data_dir = finished_run / "data"
    log = load_interactions(data_dir, ("user_idx", "item_idx", "label", "timestamp"))
    users, items = load_user_ids(data_dir), load_item_table(data_dir)["item_id"]
    found = []
    for user in range(10):
        places = np.flatnonzero(log["user_idx"] == user)[-8:]
        found.append({
            "user_id": users[user],
            "candidates": [items[item] for item in log["item_idx"][places]],
            "labels": log["label"][places].tolist(),
            "history": None,
            "as_of": int(log["timestamp"][places].min()),
        })  # fmt: skip
    new = {"candidates": items[20:50], "labels": None, "as_of": None}
    return [*found, {"user_id": "new-1", "history": items[:3], **new}, {"user_id": "new-2", "history": [], **new}]


def prepare(finished_run, source, output, **options):
    """Prepare a job as the command does before it starts processes; return the folder and the sizes of its parts."""
    folder = OutputFolder(output)
    config = load_config(finished_run / "config.yaml")
    settings = {"num_retrieved": None, "rows_per_part": 5} | options
    return folder, scoring._prepare(config, RunDir(finished_run), source, folder, **settings)


def run_main(monkeypatch, *arguments):
    """Run the command in this process and return its exit code."""
    spec = importlib.util.spec_from_file_location("score_candidates", ROOT / "launch" / "score_candidates.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["score_candidates", *map(str, arguments)])
    return module.main()


@pytest.mark.slow
def test_a_file_is_ranked_on_two_actors_from_where_it_stopped(
    finished_run, rows, recommender, tmp_path, monkeypatch, capfd
):
    source = write_requests(tmp_path / "users.parquet", rows)
    alone, sizes = prepare(finished_run, source, tmp_path / "alone")
    assert sizes == [5, 5, 2]
    for part in range(3):
        score_part(recommender, alone, part, None)
    stopped, _ = prepare(finished_run, source, tmp_path / "ranked")
    score_part(recommender, stopped, 1, None)
    before = stopped.scores(1).stat().st_mtime_ns

    arguments = ["--config", finished_run / "config.yaml", "--input", source, "--output", tmp_path / "ranked"]
    arguments += ["--rows-per-part", "5", "--num-actors", "2"]
    assert run_main(monkeypatch, *arguments) == 0
    printed, errors = capfd.readouterr()
    assert "core_worker" not in errors  # Ray's own lines
    assert "device-seconds per 1,000 users" in printed
    assert "in the order of the collaborative model" in printed
    assert stopped.scores(1).stat().st_mtime_ns == before
    for part in range(3):  # bit for bit, whichever actor scored it
        assert stopped.scores(part).read_bytes() == alone.scores(part).read_bytes()
    check_ranking(tmp_path / "ranked" / "scores", rows, recommender)
    summary = json.loads(stopped.summary.read_text())
    assert (summary["users"], summary["rows"], summary["actors"]) == (12, 140, 2)
    check_ndcg(summary, rows, recommender)
    assert not stopped.requests.exists()
    assert run_main(monkeypatch, *arguments) == 0
    assert "done already" in capfd.readouterr().out
    assert run_main(monkeypatch, *arguments, "--candidates", "cf:9") == 2
    assert "candidates: given -> cf:9" in capfd.readouterr().err


def check_ranking(folder, rows, recommender):
    table = pq.read_table(folder)
    assert table.column_names == ["user_id", "item_id", "score", "rank"]
    found = table.to_pandas().groupby("user_id", sort=False)
    assert list(found.groups) == [row["user_id"] for row in rows]
    for row, (_, ranked) in zip(rows, found, strict=True):
        expected = recommender.rank(row["history"], row["candidates"], row["user_id"], row["as_of"])
        assert ranked["rank"].tolist() == [ranked_item.rank for ranked_item in expected]
        assert ranked["item_id"].tolist() == [ranked_item.item_id for ranked_item in expected]
        assert np.abs(ranked["score"] - [ranked_item.score for ranked_item in expected]).max() < TOLERANCE


def check_ndcg(summary, rows, recommender):
    judged = [row for row in rows if row["labels"] and any(row["labels"])]
    requests = [RankingRequest(row["user_id"], None, row["candidates"], row["as_of"]) for row in judged]
    labels = np.concatenate([row["labels"] for row in judged])
    groups = np.repeat(np.arange(len(judged)), 8)
    for name, scores in (("llm", recommender.score(requests)), ("cf", recommender.score_cf(requests))):
        assert summary["ndcg@3"][name] == pytest.approx(compute_ndcg(labels, np.concatenate(scores), groups, 3))
    assert summary["ndcg@3"]["gain"] == pytest.approx(summary["ndcg@3"]["llm"] - summary["ndcg@3"]["cf"])
    assert summary["recall"] == 1


def test_the_collaborative_model_finds_the_candidates(finished_run, rows, recommender, tmp_path):
    source = write_requests(tmp_path / "users.parquet", rows)
    folder, sizes = prepare(finished_run, source, tmp_path / "out", num_retrieved=30, rows_per_part=100)
    record = score_part(recommender, folder, 0, 30)
    table = pq.read_table(folder.scores(0)).to_pandas()
    assert record["users"] == sum(sizes) == 12
    for row in rows:
        request = RankingRequest(row["user_id"], row["history"], (), row["as_of"])
        assert set(table[table["user_id"] == row["user_id"]]["item_id"]) == set(recommender.retrieve([request], 30)[0])
    summary = scoring._summarize([record])
    assert 0 < summary["recall"] < 1
    assert summary["ndcg@3"]["users"] <= summary["judged_users"]


def test_a_file_limits_what_is_retrieved(finished_run, rows, recommender, tmp_path):
    allowed = list(recommender.item_ids[:40])
    limits = [{"allowed": allowed, "blocked": None}, {"allowed": allowed, "blocked": allowed[3:]}, {"allowed": ["no"]}]
    limited = [{"user_id": row["user_id"], **limit} for row, limit in zip(rows[9:], limits, strict=True)]
    source = write_requests(tmp_path / "users.parquet", limited)
    folder, _ = prepare(finished_run, source, tmp_path / "out", num_retrieved=30, rows_per_part=100)
    record = score_part(recommender, folder, 0, 30)
    items = pq.read_table(folder.scores(0)).to_pandas().groupby("user_id")["item_id"].agg(list)
    request = RankingRequest(limited[0]["user_id"], allowed=allowed)
    assert set(items[limited[0]["user_id"]]) == set(recommender.retrieve([request], 30)[0]) < set(allowed)
    assert set(items["new-1"]) == set(allowed[:3])
    assert "new-2" not in items
    assert (record["users_without_candidates"], record["unknown_history_ids"]) == (1, 1)
    assert any("1 users have no candidates" in line for line in describe(record, folder))


def describe(record, folder):
    return scoring.describe_summary(scoring._summarize([record]) | {"seconds": 1.0, "actors": 1}, folder)


GOOD = {
    "user_id": "1",
    "candidates": ["5", "6"],
    "labels": [1, 0],
    "history": ["7"],
    "history_labels": None,
    "disliked": ["7"],
    "allowed": None,
    "blocked": None,
    "as_of": 5,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": []}, "row 1, field 'candidates': the list is empty"),
        ({"candidates": None, "labels": None}, "row 1, field 'candidates': the list is empty"),
        ({"candidates": ["5", None]}, "row 1, field 'candidates': an id in the list is null"),
        ({"candidates": ["5", "none"]}, "row 1, field 'candidates': 'none' is not in the run's item table"),
        ({"candidates": ["5", "5"]}, "row 1, field 'candidates': an item occurs twice"),
        ({"labels": [1]}, "row 1, field 'labels': the number of labels differs"),
        ({"labels": [1, 2]}, "row 1, field 'labels': a label is not 0 or 1"),
        ({"user_id": None}, "row 1, field 'user_id': the id is missing"),
        ({"history": [None]}, "row 1, field 'history': an id in the list is null"),
        ({"disliked": [None]}, "row 1, field 'disliked': an id in the list is null"),
        ({"blocked": [None]}, "row 1, field 'blocked': an id in the list is null"),
        ({"allowed": []}, "row 1, field 'allowed': this limits retrieval.* --candidates cf:N"),
        ({"blocked": ["5"]}, "row 1, field 'blocked': this limits retrieval.* --candidates cf:N"),
        ({"history_labels": [1, 0], "disliked": None}, "row 1, field 'history_labels': .* number of items in history"),
        ({"history_labels": [3], "disliked": None}, "row 1, field 'history_labels': a label is not 0 or 1"),
        ({"history_labels": [1], "disliked": None, "history": None}, "row 1, field 'history_labels': the number of"),
        ({"history_labels": [1]}, "row 1, field 'history_labels': .* leave out disliked"),
    ],
)
def test_wrong_rows_are_named(tmp_path, change, message):
    path = write_requests(tmp_path / "x.parquet", [GOOD, GOOD | change])
    with pytest.raises(RequestError, match=f"x.parquet, {message}"):
        write_parts([path], tmp_path / "parts", ["5", "6", "7"], retrieves=False, rows_per_part=10)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"candidates": [["5"]]}, "column 'user_id' is missing .found candidates"),
        ({"user_id": ["1"]}, "column 'candidates' is missing.*--candidates cf:N"),
        ({"user_id": [1.5], "candidates": [["5"]]}, "field 'user_id': the column has type double"),
        ({"user_id": ["1"], "candidates": ["5"]}, "field 'candidates': the column has type string; it must hold lis"),
        ({"user_id": ["1"], "candidates": [["5"]], "as_of": ["now"]}, "field 'as_of': the column has type string"),
        ({"user_id": ["1"], "candidates": [["5"]], "labels": [[300]]}, "field 'labels': .*correct the value"),
        ({"user_id": pa.array([], pa.string()), "candidates": pa.array([], pa.list_(pa.string()))}, "has no rows"),
    ],
)
def test_wrong_columns_are_named(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(RequestError, match=f"(?s)x.parquet.*{message}"):
        write_parts([tmp_path / "x.parquet"], tmp_path / "parts", ["5"], retrieves=False, rows_per_part=10)


def test_ids_as_numbers_and_times_as_dates(tmp_path):
    table = {
        "user_id": [1, 2, 3],
        "candidates": pa.array([[5, 6], [6], [5]], pa.large_list(pa.int32())),
        "history": pa.nulls(3),
        "labels": [[True, False], None, [True]],
        "as_of": pa.array([10**9 * 7, None, 0], pa.timestamp("ns")),
    }
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    sizes = write_parts([tmp_path / "x.parquet"], tmp_path / "parts", ["5", "6"], retrieves=False, rows_per_part=2)
    assert sizes == [2, 1]
    first = pq.read_table(tmp_path / "parts" / "part-00000.parquet").to_pylist()[0]
    assert first == {
        "user_id": "1",
        "candidates": ["5", "6"],
        "history": None,
        "history_labels": None,
        "disliked": None,
        "allowed": None,
        "blocked": None,
        "labels": [1, 0],
        "as_of": 7,
    }


def test_a_labelled_history_arrives_as_it_was_sent(tmp_path):
    rows = [GOOD | {"history": ["7", "6"], "history_labels": [0, 1], "disliked": None}, GOOD]
    path = write_requests(tmp_path / "x.parquet", rows)
    write_parts([path], tmp_path / "parts", ["5", "6", "7"], retrieves=False, rows_per_part=10)
    labelled, other = read_part(tmp_path / "parts", 0)[0]
    assert (labelled.history, labelled.history_labels, labelled.disliked) == (["7", "6"], [0, 1], None)
    assert (other.history_labels, other.disliked) == (None, ["7"])


def test_the_command_stops_before_any_work(finished_run, rows, tmp_path, monkeypatch, capsys):
    arguments = ["--config", finished_run / "config.yaml", "--output", tmp_path / "out", "--input"]
    started = time.monotonic()
    broken = write_requests(tmp_path / "x.parquet", [rows[0] | {"candidates": []}])
    for more, message in (
        ([broken], "row 0, field 'candidates': the list is empty"),
        ([tmp_path / "none.parquet"], "is neither a Parquet file"),
        ([broken, "--candidates", "200"], "'200' is not of the form cf:200"),
        ([broken, "--rows-per-part", "0"], "--rows-per-part: 0 is less than 1"),
        ([broken, "llm.dtype=bfloat16"], "config.llm.dtype: float32 -> bfloat16"),
    ):
        assert run_main(monkeypatch, *arguments, *more) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - started < 5


def test_a_run_without_a_collaborative_model_cannot_retrieve(finished_run, tmp_path):
    config = load_config(finished_run / "config.yaml")
    (tmp_path / "run").mkdir()
    for name in ("data", "stage1"):
        (tmp_path / "run" / name).symlink_to(finished_run / name)
    with pytest.raises(ArtifactError, match=r"the step 'cf' of .* is not done"):
        score_candidates(
            config, RunDir(tmp_path / "run"), tmp_path, tmp_path / "out", num_retrieved=5, accept_stage1=True
        )


@pytest.mark.slow
def test_a_killed_job_goes_on(finished_run, tmp_path):
    """After SIGKILL, sent once a part is done, the next call scores the remaining parts."""
    items = load_item_table(finished_run / "data")["item_id"]
    rows = [{"user_id": f"new-{number}", "history": items[number : number + 3]} for number in range(60)]
    source = write_requests(tmp_path / "users.parquet", rows)
    whole, killed = OutputFolder(tmp_path / "whole"), OutputFolder(tmp_path / "killed")
    command = [
        sys.executable, "launch/score_candidates.py", "--config", str(finished_run / "config.yaml"), "--input",
        str(source), "--candidates", "cf:70", "--rows-per-part", "2", "--output",
    ]  # fmt: skip
    done = subprocess.run([*command, str(whole.path)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "constructor arguments" not in done.stderr  # Ray warns if a restart may miss them
    with subprocess.Popen([*command, str(killed.path)], cwd=ROOT, start_new_session=True) as process:
        while not any(killed.record(part).exists() for part in range(30)):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert not killed.summary.exists()
    done = subprocess.run([*command, str(killed.path)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(killed.summary.read_text())["resumed_at"] > 0
    for part in range(30):
        assert killed.scores(part).read_bytes() == whole.scores(part).read_bytes()


@pytest.mark.slow
def test_a_model_whose_process_dies_is_loaded_again(finished_run, tmp_path):
    items = load_item_table(finished_run / "data")["item_id"]
    rows = [{"user_id": f"new-{number}", "history": items[number : number + 3]} for number in range(60)]
    source, folder = write_requests(tmp_path / "users.parquet", rows), OutputFolder(tmp_path / "out")
    command = [
        sys.executable, "launch/score_candidates.py", "--config", str(finished_run / "config.yaml"), "--input",
        str(source), "--candidates", "cf:70", "--rows-per-part", "2", "--num-actors", "3", "--output", str(folder.path),
    ]  # fmt: skip
    with psutil.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not any(folder.record(part).exists() for part in range(30)):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        first = next(child for child in process.children(recursive=True) if child.name().startswith("ray::_PartS"))
        first.kill()
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "60 users" in output
    assert len(list((folder.path / "scores").iterdir())) == 30


@pytest.mark.slow
def test_a_damaged_model_ends_in_a_message(finished_run, rows, tmp_path):
    """The actors find the damage when they load the model."""
    shutil.copytree(finished_run, tmp_path / "run")
    mapping = tmp_path / "run" / "stage2" / "mapping.safetensors"
    mapping.write_bytes(mapping.read_bytes()[:100])
    source = write_requests(tmp_path / "users.parquet", rows)
    command = [sys.executable, "launch/score_candidates.py", "--config", str(finished_run / "config.yaml")]
    command += ["--input", str(source), "--output", str(tmp_path / "out"), f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert "mapping.safetensors" in done.stderr
    assert done.returncode == 2, done.stdout + done.stderr
