"""Nightly runs: each extends the current run, reuses its results, and replaces it only if the promotion rule allows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import collm_dist
from collm_dist.cf.model_files import load_model
from collm_dist.cf.models.mf import MatrixFactorization
from collm_dist.cf.user_shards import UserRanges
from collm_dist.cf.weight_transfer import load_previous_weights
from collm_dist.config.loader import load_config
from collm_dist.data.ingest.forgotten_users import find_tombstones, write_tombstone
from collm_dist.data.shards.interactions import load_user_ids
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ArtifactError, ConfigError
from collm_dist.runs.promotion import decide, find_pointer, move_pointer, pin_previous, promote
from collm_dist.runs.run_dir import RunDir
from tests.integration.byte_search import find_text

ROOT = Path(__file__).parents[2]
FORGOTTEN = ("member-07", "member-31")
CONFIG = ROOT / "configs" / "tiny_cpu.yaml"


def run_night(folder, name, overrides, *more):
    """Run the pipeline of one night and return its status and what it printed."""
    command = [sys.executable, "launch/run_pipeline.py", "--config", str(CONFIG), f"run.dir={folder / name}"]
    command += [*overrides, f"dataset.extend_from={folder / 'current'}", *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / name / "status.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def nights(tmp_path_factory, tiny_ratings, tiny_backbone_dir):
    """A log of 1,000 rows with strings as ids; the next night 100 more, refused first, then let through.

    The second night forgets two users, is published, and reads its shards on a local disk. Folder and statuses.
    """
    folder = tmp_path_factory.mktemp("nights")
    header, *rows = (tiny_ratings / "ratings.csv").read_text().splitlines(keepends=True)
    lines = [header, *(f"member-{int(user):02d},{rest}" for user, rest in (row.split(",", 1) for row in rows))]
    log = folder / "ratings.csv"
    (folder / "forget.csv").write_text("user_id\n" + "\n".join(FORGOTTEN) + "\n")
    overrides = [
        f"dataset.path={log}",
        f"dataset.items_path={tiny_ratings / 'items.csv'}",
        f"llm.backbone={tiny_backbone_dir}",
        "stage1.refresh_every_days=60",
        "promotion.min_paired_difference=-1",
        "evaluation.bootstrap_samples=50",
    ]
    log.write_text("".join(lines[:1001]))
    found = {"first": run_night(folder, "one", overrides)}
    found["pointer after the first"] = str((folder / "current").readlink())
    log.write_text("".join(lines[:1100]) + "new-user,1,5,1025000000\n")
    overrides += [
        f"dataset.forget={folder / 'forget.csv'}",
        f"run.publish_to={folder / 'published'}",
        f"cluster.local_scratch={folder / 'local'}",
    ]
    found["refused"] = run_night(folder, "two", overrides, "promotion.min_paired_difference=1")
    found["pointer after the refused"] = str((folder / "current").readlink())
    found["second"] = run_night(folder, "two", overrides)
    found["pointer after the second"] = str((folder / "current").readlink())
    return folder, found


def test_the_rule_moves_the_pointer_or_leaves_it(nights):
    _, found = nights
    assert (found["first"][0]["state"], found["pointer after the first"]) == ("promoted", "one")
    assert (found["refused"][0]["state"], found["pointer after the refused"]) == ("rejected", "one")
    assert "its lower end is not at least +1" in found["refused"][0]["message"]
    assert (found["second"][0]["state"], found["pointer after the second"]) == ("promoted", "two")
    assert found["second"][1].count("done already") == 5  # a second decision takes no work


def test_the_second_night_extends_the_first(nights):
    folder, found = nights
    before, after = (load_manifest(folder / name / "data") for name in ("one", "two"))
    users = [load_user_ids(folder / name / "data") for name in ("one", "two")]
    assert "new-user" in users[1][before.num_users :]
    assert len(users[1]) == after.num_users > before.num_users
    assert [user for user, then in zip(users[1], users[0], strict=False) if user != then] == [
        write_tombstone(users[0].index(user)) for user in sorted(FORGOTTEN, key=users[0].index)
    ]
    assert RunDir(folder / "two").read_record("data")["extends"]["users_hash"] == before.users_hash
    record = RunDir(folder / "two").read_record("stage1")
    assert record["taken_from"] == str(folder / "one")
    assert "taken from" in found["refused"][1]
    assert (folder / "two" / "stage1" / "merged").resolve() == folder / "one" / "stage1" / "merged"
    fingerprint = RunDir(folder / "two").read_record("stage2")["fingerprint"]
    assert fingerprint["input.previous.stage2"] == RunDir(folder / "one").read_record("stage2")["content_hash"]


def test_nothing_of_a_forgotten_user_is_left(nights):
    folder, _ = nights
    assert find_text(folder / "one", FORGOTTEN[0])
    for name in ("two", "published/two", "local"):
        assert not any(find_text(folder / name, user) for user in FORGOTTEN), name
    places = find_tombstones(folder / "two" / "data")
    before, after = (load_model(folder / name / "cf" / "model.safetensors")[1] for name in ("one", "two"))
    assert len(places) == 2
    assert before.users.known[places].all()
    assert not after.users.known[places].any()
    assert not after.users.weight[places].any()
    shown = RunDir(folder / "two").read_record("data")["forgotten"]
    assert (shown["users_asked"], shown["users_in_log"], shown["users_in_extended_run"]) == (2, 2, 2)


def test_what_is_published_is_a_run(nights):
    folder, found = nights
    assert found["refused"][1].count(" already there (") == 5
    assert found["second"][1].count("published already") == 5
    published = folder / "published" / "two"
    assert json.loads((published / "promotion.json").read_text())["state"] == "promoted"
    ours, theirs = (collm_dist.load_recommender(path, device="cpu") for path in (folder / "two", published))
    request = {"history": ["3", "5", "8"], "candidates": ["1", "2", "4"]}
    assert ours.rank(**request) == theirs.rank(**request)
    shards = load_manifest(folder / "two" / "data").shards
    assert {path.stem for path in (folder / "local").glob("*.tar")} <= {shard.sha256 for shard in shards}
    assert len(list((folder / "local").glob("*.tar"))) >= 3


def test_earlier_runs_that_hold_forgotten_users_are_found_and_removed(nights, tmp_path):
    folder = tmp_path / "nights"
    shutil.copytree(nights[0], folder, symlinks=True)
    before = collm_dist.load_recommender(folder / "two", device="cpu").rank(history=["3"], candidates=["1", "2"])
    command = [sys.executable, "launch/forget_users.py", "--users", str(folder / "forget.csv"), "--runs"]

    def run(*more):
        done = subprocess.run([*command, *map(str, more)], cwd=ROOT, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    code, shown = run(folder / "one", folder / "two", folder / "current")
    assert (code, shown.count("listed users")) == (0, 3)
    assert f"{folder / 'one'}: 2 listed users\n{folder / 'two'}: 0 listed users" in shown
    code, shown = run(folder / "one", "--apply")
    assert code == 2
    assert f"name {folder / 'two'} among the runs too" in shown
    (folder / "in-use").symlink_to("one")
    code, shown = run(folder / "one", folder / "two", "--apply")
    assert code == 2
    assert "which is in use" in shown
    assert (folder / "two" / "stage1" / "merged").is_symlink()
    (folder / "in-use").unlink()
    (folder / ".removed-older" / "data").mkdir(parents=True)  # as if the command had been killed
    code, shown = run(folder / "older", folder / "one", folder / "two", "--apply")
    assert code == 0, shown
    assert f"{folder / 'older'}: its removal was interrupted, and --apply finishes it" in shown
    assert not (folder / ".removed-older").exists()
    assert {path.name for path in folder.iterdir()} >= {"two", "current"}
    assert not [path for path in folder.iterdir() if "one" in path.name]
    assert not (folder / "two" / "stage1" / "merged").is_symlink()
    after = collm_dist.load_recommender(folder / "two", device="cpu").rank(history=["3"], candidates=["1", "2"])
    assert after == before
    (folder / "two" / "data" / "users.parquet").unlink()
    code, shown = run(folder / "two", "--apply")
    assert code == 2
    assert "so its users are unknown" in shown
    assert (folder / "two").exists()


def test_both_models_score_the_same_rows(nights):
    folder, _ = nights
    report = RunDir(folder / "two").read_record("eval")
    rows = {row["model"]: row for row in report["rows"] if (row["split"], row["slice"]) == ("test", "all")}
    assert rows["previous"]["rows"] == rows["stage2"]["rows"]
    assert rows["previous"]["auc"] != rows["stage2"]["auc"]
    (difference,) = (
        row
        for row in report["differences"]
        if (row["model"], row["versus"], row["slice"]) == ("stage2", "previous", "all")
    )
    assert difference["auc"] == pytest.approx(rows["stage2"]["auc"] - rows["previous"]["auc"], abs=1e-12)


def test_vectors_stay_where_they_were(nights):
    """The second night's item vectors lie closer to the first night's than those of a training from nothing."""
    folder, _ = nights
    path = "cf/model.safetensors"
    first, second = (load_model(folder / name / path)[1] for name in ("one", "two"))
    known = (first.items.known & second.items.known)[:-1].nonzero()[:, 0]
    a, b = (recommender.item_vectors(known)[:, :-1] for recommender in (first, second))
    cosines = torch.nn.functional.cosine_similarity(a, b)
    print("mean cosine", float(cosines.mean()))
    assert float(cosines.mean()) > 0.9


def test_weights_find_their_rows_in_tables_that_have_grown(nights):
    folder, _ = nights
    before, after = (load_manifest(folder / name / "data") for name in ("one", "two"))
    path = folder / "one" / "cf" / "model.safetensors"
    old = load_model(path)[1]
    model = MatrixFactorization(
        before.num_users + 1, after.num_items + 2, embedding_dim=4, history_length=8, prior_precision=1.0
    )
    users = UserRanges(((before.num_users - 1, 2), (0, before.num_users - 1)))  # a worker's own order
    first = int(old.users.known.nonzero()[0])  # a user who is forgotten tonight
    weights, message = load_previous_weights(path, "mf", model, users, torch.tensor([first]))
    assert "starts from the weights" in message
    assert torch.equal(weights["users.weight"][0], old.users.weight[-1] * old.users.known[-1])
    kept = old.users.weight[:-1] * old.users.known[:-1, None]
    assert kept[first].any()
    kept[first] = 0
    assert torch.equal(weights["users.weight"][2:], kept)
    assert not weights["users.known"][2 + first]
    assert not weights["users.known"][1]
    assert torch.equal(weights["items.weight"][: before.num_items], old.items.weight[:-1])
    assert torch.equal(weights["items.weight"][-1], old.items.weight[-1])
    assert not weights["items.known"][before.num_items : -1].any()
    assert load_previous_weights(path, "din", model, users, torch.tensor([]))[0] is None
    wider = MatrixFactorization(
        before.num_users + 1, after.num_items, embedding_dim=5, history_length=8, prior_precision=1.0
    )
    assert load_previous_weights(path, "mf", wider, users, torch.tensor([]))[0] is None


def make_config(tmp_path, *overrides):
    return load_config(CONFIG, [f"run.dir={tmp_path / 'today'}", "promotion.min_paired_difference=0", *overrides])


def test_a_link_is_pinned_once(tmp_path):
    config = make_config(tmp_path, f"dataset.extend_from={tmp_path / 'current'}")
    assert pin_previous(config).dataset.extend_from is None  # the first run
    (tmp_path / "one").mkdir()
    move_pointer(tmp_path / "current", tmp_path / "one")
    assert pin_previous(config).dataset.extend_from == str(tmp_path / "one")
    (tmp_path / "today").mkdir()
    move_pointer(tmp_path / "current", tmp_path / "today")
    with pytest.raises(ConfigError, match="leads to this very run"):
        pin_previous(config)
    (tmp_path / "today" / "config.yaml").write_text(f"dataset: {{extend_from: {tmp_path / 'one'}}}\n")
    assert pin_previous(config).dataset.extend_from == str(tmp_path / "one")
    elsewhere = make_config(tmp_path, f"dataset.extend_from={tmp_path / 'one'}")
    assert pin_previous(elsewhere) is elsewhere


@pytest.mark.parametrize(
    ("decision", "overrides", "is_accepted"),
    [(None, [], False), ("{", [], False), ('{"reason": "its lower end"}', [], False),
     ('{"reason": "no earlier run to compare with"}', [], True), (None, ["promotion.baseline=cf"], False),
     ('{"reason": "its lower end"}', ["promotion.baseline=cf"], True)],
)  # fmt: skip
def test_a_run_that_began_without_an_extension_is_not_compared_with_nothing(tmp_path, decision, overrides, is_accepted):
    """Unless it is the run that was in use first, or an earlier run is not what it is compared with."""
    today = tmp_path / "today"
    for folder in (today, tmp_path / "one"):
        folder.mkdir()
    (today / "config.yaml").write_text("dataset: {extend_from: null}\n")
    if decision is not None:
        (today / "promotion.json").write_text(decision)
    config = make_config(tmp_path, f"dataset.extend_from={tmp_path / 'current'}", *overrides)
    assert pin_previous(config).dataset.extend_from is None  # nothing is in use yet
    move_pointer(tmp_path / "current", today)
    assert pin_previous(config).dataset.extend_from is None
    move_pointer(tmp_path / "current", tmp_path / "one")
    if is_accepted:
        assert pin_previous(config).dataset.extend_from is None
    else:
        with pytest.raises(ConfigError, match=r"extend_from: .*current' leads to .*one, but .* begun without"):
            pin_previous(config)


def test_a_pointer_that_is_no_link_is_left_alone(tmp_path):
    (tmp_path / "current").mkdir()
    assert find_pointer(make_config(tmp_path)) == tmp_path / "current"
    with pytest.raises(ArtifactError, match="not a symbolic link"):
        move_pointer(tmp_path / "current", tmp_path)


@pytest.mark.parametrize(
    ("rule", "state"),
    [("min_paired_difference=-0.02", "promoted"), ("min_paired_difference=-0.01", "promoted"),
     ("min_paired_difference=0", "rejected"), ("metric=uauc", "rejected")],
)  # fmt: skip
def test_the_rule_reads_the_lower_end(tmp_path, rule, state):
    row = {"split": "test", "slice": "all", "model": "stage2", "versus": "cf", "rows": 1000}
    row |= {"auc": 0.01, "auc_low": -0.01, "auc_high": 0.03, "uauc": -0.1, "uauc_low": -0.2, "uauc_high": 0.1}
    config = make_config(tmp_path, "promotion.baseline=cf", f"promotion.{rule}")
    assert decide(config, {"differences": [row], "left_out": {}})["state"] == state
    anchored = make_config(tmp_path, "promotion.baseline=anchor", "anchor.kind=as_of", f"promotion.{rule}")
    report = {"anchor": "cf", "differences": [row, row | {"versus": "anchor", "auc_low": -1}], "left_out": {}}
    assert decide(anchored, report)["state"] == state


def promote_run(folder, name, extends, *overrides, in_use=None):
    """Decide about a run that is better than the run it extends; return the state, the reason and the run in use."""
    row = {"split": "test", "slice": "all", "model": "stage2", "versus": "previous", "rows": 1000}
    row |= {"auc": 0.02, "auc_low": 0.01, "auc_high": 0.03}
    row |= {"versus": "cf"} if "promotion.baseline=cf" in overrides else {}
    run_dir = RunDir(folder / name)
    report = {"differences": [row], "left_out": {}, "content_hash": name}
    run_dir.write_record("eval", report)
    if in_use is not None:
        (folder / in_use).mkdir(exist_ok=True)
        move_pointer(folder / "current", folder / in_use)
    config = load_config(CONFIG, [f"run.dir={run_dir.path}", "promotion.min_paired_difference=0", *overrides])
    extends = None if extends is None else str(folder / extends)
    dataset = config.dataset.model_copy(update={"extend_from": extends})
    decision = promote(config.model_copy(update={"dataset": dataset}), run_dir)
    assert json.loads((run_dir.path / "promotion.json").read_text()) == decision
    pointer = folder / "current"
    return decision["state"], decision["reason"], pointer.resolve().name if pointer.is_symlink() else None


def test_of_two_runs_that_extend_the_same_run_the_second_does_not_replace_the_first(tmp_path):
    assert promote_run(tmp_path, "a", None)[::2] == ("promoted", "a")
    assert promote_run(tmp_path, "c", "a")[::2] == ("promoted", "c")
    state, reason, in_use = promote_run(tmp_path, "b", "a")
    assert (state, in_use) == ("rejected", "c")
    assert f"current leads to {tmp_path / 'c'}, but this run was compared with {tmp_path / 'a'}; " in reason
    assert f"extend_from={tmp_path / 'current'}" in reason
    assert promote_run(tmp_path, "b", "a")[::2] == ("rejected", "c")
    assert promote_run(tmp_path, "a", None)[::2] == ("promoted", "c")  # as recorded; the link stays
    assert promote_run(tmp_path, "b", "a", in_use="a")[::2] == ("promoted", "b")


def test_a_run_that_extends_nothing_does_not_replace_a_run_in_use(tmp_path):
    state, reason, in_use = promote_run(tmp_path, "new", None, in_use="old")
    assert (state, in_use) == ("rejected", "old")
    assert f"leads to {tmp_path / 'old'}, but this run was compared with no earlier run; " in reason
    assert promote_run(tmp_path, "itself", None, in_use="itself")[::2] == ("promoted", "itself")
    (tmp_path / "itself" / "promotion.json").unlink()
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("removed")
    assert promote_run(tmp_path, "itself", None)[::2] == ("promoted", "itself")


def test_another_baseline_replaces_any_run(tmp_path):
    assert promote_run(tmp_path, "new", None, "promotion.baseline=cf", in_use="old")[::2] == ("promoted", "new")


def test_a_rule_without_its_numbers_is_refused(tmp_path):
    config = make_config(tmp_path, "promotion.baseline=cf")
    with pytest.raises(ArtifactError, match="the step 'cf' has not run"):
        decide(config, {"differences": [], "left_out": {"cf": "the step 'cf' has not run"}})
    for wrong in ("evaluation.bootstrap_samples=0", "evaluation.splits=[valid]", "promotion.metric=ndcg@3"):
        with pytest.raises(ConfigError, match="promotion"):
            make_config(tmp_path, wrong)
