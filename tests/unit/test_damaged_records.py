"""Small records beside a run that are damaged: made again, or refused with their name."""

import json
import shutil

import pyarrow as pa
import pytest
import safetensors.torch
import torch

from collm_dist.cf.jobs import Job
from collm_dist.cf.sharded_checkpoint import RECORD, read_state
from collm_dist.config import CfConfig, Config
from collm_dist.data.accepted_config import _check_checkpoint
from collm_dist.data.ingest.shuffle_files import find_finished
from collm_dist.errors import CheckpointError, CollmError, DamagedCheckpointError, DataError
from collm_dist.monitoring.run_tracker import KEY_FILE, RunTracker
from collm_dist.runs.promotion import pin_previous
from collm_dist.runs.run_dir import RunDir
from collm_dist.runs.user_deletion import choose_runs, find_held_users
from collm_dist.tuning.checkpoints import _compute_checksum, load_checkpoint
from tests.unit.evaluation_run import build_config

DAMAGE = {"cut": '{"key": ', "list": "[1]", "text": "3", "junk": "\x00{[", "deep": "[" * 100_000, "folder": None}


def put(path, text):
    """Write a text; None makes a folder in the place of the file."""
    if path.is_file():
        path.unlink()
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)


@pytest.mark.parametrize("way", DAMAGE)
def test_a_task_or_job_with_a_damaged_result_runs_again(tmp_path, way):
    marker = tmp_path / "result.json"
    marker.write_text(json.dumps({"key": "k", "rows": 3}))
    job = Job(tmp_path, tmp_path, "k", CfConfig(), seed=0)
    assert find_finished(marker) == job.read_result() == {"key": "k", "rows": 3}
    put(marker, DAMAGE[way])
    assert find_finished(marker) is None
    assert job.read_result() is None
    if marker.is_dir():
        shutil.rmtree(marker)
    marker.unlink(missing_ok=True)
    assert find_finished(marker) is None
    assert job.read_result() is None


@pytest.mark.parametrize("way", DAMAGE)
def test_a_damaged_state_of_a_cf_training_is_named(tmp_path, way):
    put(tmp_path / RECORD, DAMAGE[way])
    with pytest.raises(CheckpointError, match=r"state\.json is damaged .*: delete it"):
        read_state(tmp_path, "key")


def test_a_checkpoint_whose_header_is_nested_too_deeply_is_damaged(tmp_path):
    path = tmp_path / "stage1" / "checkpoints" / "step-000000003.safetensors"
    path.parent.mkdir(parents=True)
    tensors = {"weight.a": torch.zeros(1)}
    header = {"adam_steps": "3", "progress": "{}", "fingerprint": DAMAGE["deep"]}
    safetensors.torch.save_file(tensors, path, header | {"checksum": _compute_checksum(tensors, header)})
    _check_checkpoint(build_config(tmp_path), RunDir(tmp_path), "stage1")  # left to the stage
    with pytest.raises(DamagedCheckpointError, match="the checkpoint is damaged"):
        load_checkpoint(path, {})


@pytest.mark.parametrize("way", [way for way in DAMAGE if way != "folder"])
def test_a_damaged_key_of_an_mlflow_run_gives_a_new_run(tmp_path, way):
    tracker = object.__new__(RunTracker)  # without its thread
    tracker._run_dir, tracker._is_new = RunDir(tmp_path), False
    put(tmp_path / KEY_FILE, DAMAGE[way])
    key = tracker._read_key()
    assert json.loads((tmp_path / KEY_FILE).read_text())["key"] == key == tracker._read_key()


@pytest.mark.parametrize("way", ["cut", "list", "junk", "deep", "folder"])
def test_damaged_settings_of_a_run_are_named(tmp_path, way):
    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    (tmp_path / "current").symlink_to(tmp_path / "elsewhere")
    config = Config.model_validate(
        {"run": {"dir": str(run)},
         "dataset": {"path": "a.csv", "columns": {"rating": "r"}, "extend_from": str(tmp_path / "current")}}
    )  # fmt: skip
    put(run / "config.yaml", DAMAGE[way])
    with pytest.raises(CollmError, match=r"config\.yaml") as caught:
        find_held_users([run], pa.array(["u"]), lambda _: ["u"])
    assert caught.value.exit_code == 2
    with pytest.raises(CollmError, match=r"config\.yaml"):
        pin_previous(config)


def test_runs_to_search_for_users_exist_and_what_is_skipped_is_said(tmp_path):
    (tmp_path / "one" / "data").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "current").symlink_to("one")
    others = [tmp_path / "cache", tmp_path / "current"]
    runs, skipped = choose_runs([tmp_path / "one", *others])
    assert runs == [tmp_path / "one"]
    assert [line.partition(": skipped, ")[0] for line in skipped] == list(map(str, others))
    with pytest.raises(DataError, match=r"typo/\* does not exist; name existing run directories$"):
        choose_runs([tmp_path / "one", tmp_path / "typo" / "*"])
    with pytest.raises(DataError, match=r"none of these is a run directory:\n  .*cache: skipped.*\n  .*current: "):
        choose_runs(others)
    (tmp_path / ".removed-two").mkdir()
    assert choose_runs([tmp_path / "two"]) == (
        [],
        [f"{tmp_path}/two: its removal was interrupted, and --apply finishes it"],
    )


@pytest.mark.parametrize("text", ["run: [1]", "run: {publish_to: [1]}", "dataset: 3", ""])
def test_settings_of_another_shape_name_no_place(tmp_path, text):
    (tmp_path / "data").mkdir()
    (tmp_path / "config.yaml").write_text(text)
    (held,) = find_held_users([tmp_path], pa.array(["u"]), lambda _: ["u"])
    assert (held.count, held.published_to) == (1, None)
