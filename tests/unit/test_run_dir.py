"""Records, fingerprints and files that appear whole."""

import json
import math

import pytest

from collm_dist.config import Config
from collm_dist.config.loader import list_fields
from collm_dist.errors import ArtifactError, LaunchError, Preempted
from collm_dist.runs.atomic_files import clear_unfinished, compute_json_hash, open_atomic, write_json
from collm_dist.runs.fingerprints import STEP_FIELDS, compute_fingerprint, find_changes, is_step_current
from collm_dist.runs.run_dir import STEPS, RunDir, clear_checkpoints


def build_config(**sections) -> Config:
    return Config.model_validate(
        {"run": {"dir": "runs/x"}, "dataset": {"path": "a.csv", "columns": {"rating": "r"}}, **sections}
    )


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    """A run whose steps are all done."""
    run_dir = RunDir(tmp_path / "run")
    for step in STEPS:
        write_json(run_dir.record_path(step), {"content_hash": f"hash of {step}", "fingerprint": {}})
    return run_dir


def test_settings_that_change_no_result_are_in_no_fingerprint(run_dir):
    plain = build_config()
    other = build_config(
        cluster={"num_processes": 4, "zero_stage": 3}, monitoring={"tensorboard": False}, cf={"num_workers": 2},
        stage1={"max_tokens_per_micro_batch": 64},
    )  # fmt: skip
    for step in STEPS:
        assert compute_fingerprint(plain, step, run_dir) == compute_fingerprint(other, step, run_dir)


def test_every_other_setting_is_in_one():
    """A setting that no fingerprint knows could change without anybody noticing."""
    known = {key for step in STEPS for key in compute_fingerprint(build_config(), step, _AllDone())}
    for name, field in list_fields(Config):
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        operational = extra.get("operational")
        if extra.get("optional"):  # left out while it is None
            prefixes = {prefix for step in STEPS for prefix in STEP_FIELDS[step]}
            assert any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes), name
            continue
        # Expectations about the input change no result; a search is not a step and tracks its own settings.
        if not operational and not name.startswith(("dataset.expect.", "cf_search.", "stage_search.")):
            assert f"config.{name}" in known, name


class _AllDone(RunDir):
    def __init__(self):
        pass

    def read_record(self, step):
        return {"content_hash": step}


def test_a_stage_does_not_depend_on_the_other_ones_prompt(run_dir):
    changed = build_config(prompt={"stage2": "other.txt"})
    assert compute_fingerprint(changed, "stage1", run_dir) == compute_fingerprint(build_config(), "stage1", run_dir)
    assert compute_fingerprint(changed, "stage2", run_dir) != compute_fingerprint(build_config(), "stage2", run_dir)


def test_upstream_hashes_and_inputs_count(run_dir):
    before = compute_fingerprint(build_config(), "stage2", run_dir, {"prompt": "a"})
    write_json(run_dir.record_path("cf"), {"content_hash": "new"})
    after = compute_fingerprint(build_config(), "stage2", run_dir, {"prompt": "b"})
    assert find_changes(before, after) == ["input.prompt: a -> b", "upstream.cf: hash of cf -> new"]


def test_without_stage1_nothing_waits_for_it(run_dir):
    run_dir.withdraw("stage1")
    config = build_config(stage1={"enabled": False})
    assert "upstream.stage1" not in compute_fingerprint(config, "stage2", run_dir)
    with pytest.raises(ArtifactError, match="run the step 'stage1' first"):
        compute_fingerprint(build_config(), "stage2", run_dir)


def test_current_changed_and_missing(run_dir):
    write_json(run_dir.record_path("cf"), {"fingerprint": {"config.cf.embedding_dim": 8}})
    assert is_step_current(run_dir, "cf", {"config.cf.embedding_dim": 8})
    with pytest.raises(ArtifactError) as caught:
        is_step_current(run_dir, "cf", {"config.cf.embedding_dim": 16})
    assert "config.cf.embedding_dim: 8 -> 16" in str(caught.value)
    assert "--force cf" in str(caught.value)
    assert "run.dir" in str(caught.value)
    run_dir.withdraw("cf")
    assert not is_step_current(run_dir, "cf", {})


def test_a_damaged_record_is_named(run_dir):
    run_dir.record_path("data").write_text('{"rows": 3')
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        run_dir.read_record("data")


def test_withdrawing_a_linked_step_leaves_the_other_run_alone(run_dir, tmp_path):
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    other.step_dir("cf").symlink_to(run_dir.step_dir("cf"))
    assert other.is_done("cf")
    other.withdraw("cf")
    assert not other.step_dir("cf").exists()
    assert run_dir.is_done("cf")


def test_withdrawing_a_step_unlinks_entries_that_are_taken_from_another_run(run_dir, tmp_path):
    """As of stage 1, whose products a nightly run may take from the run before."""
    adapter, checkpoints = tmp_path / "before" / "adapter", tmp_path / "disk"
    for folder in (adapter, checkpoints):
        folder.mkdir(parents=True)
    stage = run_dir.step_dir("stage1")
    stage.mkdir(exist_ok=True)
    (stage / "adapter").symlink_to(adapter)
    (stage / "checkpoints").symlink_to(checkpoints)
    run_dir.withdraw("stage1")
    assert not (stage / "adapter").exists()
    assert adapter.exists()
    assert (stage / "checkpoints").resolve() == checkpoints


@pytest.mark.parametrize("is_linked", [False, True])
def test_checkpoints_are_cleared_on_their_own_disk(tmp_path, is_linked):
    folder, disk = tmp_path / "cf" / "checkpoints", tmp_path / "disk"
    folder.parent.mkdir()
    clear_checkpoints(folder)  # there is none yet
    for path in (disk if is_linked else folder, tmp_path / "other"):
        path.mkdir()
        (path / "result.json").touch()
    if is_linked:
        folder.symlink_to(disk)
        (disk / "ray").mkdir()
        (disk / "linked").symlink_to(tmp_path / "other")
    clear_checkpoints(folder)
    assert folder.is_symlink() == is_linked == folder.exists()
    assert not is_linked or not list(disk.iterdir())
    assert (tmp_path / "other" / "result.json").exists()


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), open_atomic(path) as file:  # noqa: PT012
        file.write("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}


def test_json_hash_does_not_see_the_order_of_keys():
    assert compute_json_hash({"a": 1, "b": [2]}) == compute_json_hash({"b": [2], "a": 1})
    assert compute_json_hash({"a": 1}) != compute_json_hash({"a": 2})


@pytest.mark.parametrize(("error", "is_kept"), [(KeyboardInterrupt, False), (Preempted, False), (LaunchError, True)])
def test_files_that_killed_workers_leave_are_deleted_when_a_step_is_stopped(tmp_path, error, is_kept):
    write_json(tmp_path / "work" / "done.json", {})
    unfinished = tmp_path / "work" / ".state.x7.tmp"
    unfinished.touch()
    with pytest.raises(error), clear_unfinished(tmp_path):
        raise error("stop")
    assert (unfinished.exists(), (tmp_path / "work" / "done.json").exists()) == (is_kept, True)
