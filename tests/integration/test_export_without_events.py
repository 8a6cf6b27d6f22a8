"""Exports without users: the same scores for new users, refusals for all others, and no id in any byte."""

import subprocess
import sys
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors

import collm_dist
from collm_dist.config.loader import load_config
from collm_dist.errors import RequestError
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.event_store import EventStore
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.licences import Licences
from collm_dist.serving.requests import RankingQuery
from tests.conftest import REPOSITORY
from tests.integration.byte_search import find_text
from tests.integration.test_score_candidates import prepare

LICENCES = Licences("mit", "mit", "made up")


def export(run, folder):
    return export_model(load_config(run / "config.yaml"), RunDir(run), folder, LICENCES, with_events=False)


def read_scores(ranking):
    return {item.item_id: item.score for item in ranking}


def compare_new_users(here, there, item_ids):
    """Compare rankings of given histories, with candidates and with retrieved items. Measured: 6e-8, by rounding."""
    for history in (item_ids[:3], item_ids[5:6], []):
        for more in ({"candidates": item_ids[3:12]}, {"num_retrieved": 7}):
            ours, theirs = (read_scores(one.rank(history=history, **more)) for one in (here, there))
            assert ours
            assert theirs == pytest.approx(ours, abs=1e-5)
    request = {"history": item_ids[:4], "history_labels": [1, 0, 1, 1], "candidates": item_ids[4:8]}
    assert read_scores(there.rank(**request)) == pytest.approx(read_scores(here.rank(**request)), abs=1e-5)
    here, there = (one.compare(RankingQuery(history=item_ids[:3])) for one in (here, there))
    assert type(here) is type(there)


@pytest.mark.parametrize("which", ["finished_run", pytest.param("finished_clicks_run", marks=pytest.mark.slow)])
def test_new_users_get_the_same_scores_and_others_are_refused(request, which, tmp_path):
    """The clicks' stage 2 has trained the collaborative model, so its file has rows of users too."""
    run = request.getfixturevalue(which)
    export(run, tmp_path / "exported")
    imported = import_model(tmp_path / "exported", RunDir(tmp_path / "run"))
    here, there = (collm_dist.load_recommender(path, device="cpu") for path in (run, imported.path))
    assert there.user_ids == []
    compare_new_users(here, there, there.item_ids)
    user = here.user_ids[0]
    for more in ({"candidates": there.item_ids[:3]}, {"num_retrieved": 3}, {"disliked": there.item_ids[:1]}):
        with pytest.raises(RequestError, match="exported without users and events; give history"):
            there.rank(user=user, **more)
    named = there.rank(user=user, history=there.item_ids[:2], candidates=there.item_ids[2:5])
    assert named.warnings == [f"user: {user!r} is not in the run's log; the items are ranked for an unknown user"]
    with pytest.raises(RequestError, match="leave as_of out"):
        there.rank(history=there.item_ids[:2], candidates=there.item_ids[2:5], as_of=1)
    rows = [{"user_id": "a", "candidates": there.item_ids[:2], "history": there.item_ids[2:4], "as_of": None}] * 2
    for changed, message in (
        ({"history": None}, "field 'history': this run was"),
        ({"as_of": 1}, "field 'as_of': .*null"),
    ):
        pq.write_table(pa.Table.from_pylist([*rows, rows[0] | changed]), tmp_path / "users.parquet")
        with pytest.raises(RequestError, match=rf"users\.parquet, row 2, {message}"):
            prepare(imported.path, tmp_path / "users.parquet", tmp_path / "job")
    for path in (tmp_path / "exported" / "cf").glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            sizes = {name: file.get_tensor(name).shape[0] for name in file.keys() if name.startswith("users.")}  # noqa: SIM118
        assert sizes
        assert set(sizes.values()) == {0}
    assert not (tmp_path / "exported" / "data" / "interactions").exists()
    assert "no users and no events" in (tmp_path / "exported" / "README.md").read_text()
    # An imported run is exported without them too, whatever is asked for.
    config = load_config(imported.path / "config.yaml")
    again = export_model(config, imported, tmp_path / "again", LICENCES)
    assert pq.read_table(again / "data" / "users.parquet").num_rows == 0
    assert import_model(again, RunDir(tmp_path / "second")).is_done("stage2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("cf.cross_fit=2", "anchor.kind=blend", "promotion.baseline=anchor"),
        ("cf.model=lightgcn",),
        ("stage2.train_cf=true",),
        ("stage2.train_cf=scratch",),
        ("cf.model=none", "stage2.train_cf=scratch"),
        ("dataset.users_path={folder}/users.csv", "dataset.user_text={about}",
         "prompt.stage1=User: <UserText>. Liked: <ItemTitleList>. Like <TargetItemTitle>? Answer:"),
    ],
    ids=["anchor", "lightgcn", "train_cf", "scratch", "id tokens", "user texts"],
)  # fmt: skip
def test_no_byte_names_a_user(settings, tmp_path, tiny_ratings, tiny_backbone_dir):
    from tests.integration.finished_run import build_run

    header, *rows = (tiny_ratings / "ratings.csv").read_text().splitlines()
    cells = [row.split(",", 1) for row in rows]
    lines = [header, *(f"member-{int(user):04d},{rest}" for user, rest in cells), "member-0001,1,bad,1"]
    (tmp_path / "ratings.csv").write_text("\n".join(lines) + "\n")
    users = [f"member-{number:04d},likes quiet-{number:04d} films" for number in range(1, 71)]
    (tmp_path / "users.csv").write_text("\n".join(["user_id,about", *users]) + "\n")
    overrides = [f"run.dir={tmp_path / 'run'}", f"dataset.path={tmp_path / 'ratings.csv'}",
                 f"dataset.items_path={tiny_ratings / 'items.csv'}", f"llm.backbone={tiny_backbone_dir}",
                 "dataset.row_filter=user_id != 'member-0060'"]  # fmt: skip
    overrides += [setting.replace("{folder}", str(tmp_path)) for setting in settings]
    run = build_run(REPOSITORY / "configs" / "tiny_cpu.yaml", overrides)
    with_all = export_model(load_config(run / "config.yaml"), RunDir(run), tmp_path / "all", LICENCES)
    assert find_text(with_all, "member-"), "the search finds nothing at all"
    exported = export(run, tmp_path / "exported")
    assert find_text(exported, "member-") == []
    assert find_text(exported, "quiet-") == []
    imported = import_model(exported, RunDir(tmp_path / "imported"))
    here, there = (collm_dist.load_recommender(path, device="cpu") for path in (run, imported.path))
    if here.has_cf:
        compare_new_users(here, there, there.item_ids)
    else:
        request = {"history": there.item_ids[:3], "candidates": there.item_ids[3:9]}
        assert read_scores(there.rank(**request)) == pytest.approx(read_scores(here.rank(**request)), abs=1e-5)
    # The ids come back by events alone, which the owner of the service has.
    with closing(EventStore(tmp_path / "events")) as store:
        fresh = collm_dist.load_recommender(imported.path, device="cpu", events=store)
        with pytest.raises(RequestError, match="give history"):
            fresh.rank(user="member-0001", candidates=there.item_ids[:3])
    ranked = [sys.executable, "launch/forget_users.py", "--users", str(tmp_path / "users.csv"), "--runs"]
    done = subprocess.run([*ranked, str(imported.path)], cwd=REPOSITORY, capture_output=True, text=True)
    assert "0 listed users" in done.stdout, done.stdout + done.stderr
