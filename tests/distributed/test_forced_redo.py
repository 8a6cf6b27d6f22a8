"""``--force`` that is interrupted: the same command resumes its redo, and begins another only after its end."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.distributed.conftest import PIPELINE, STAGE1, run, start, wait_for_step
from tests.distributed.test_faults import assert_same_end, find_tuning
from tests.distributed.test_tuning import PYTHON, TORCHRUN

MARK = "mine"  # a file that a redo from scratch deletes


def interrupt(process):
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output


def wait_for_removal(process, path):
    while path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stage_resumes_with_its_checkpoints_on_another_disk(copy_run, whole, tmp_path):
    folder, overrides = copy_run("run")
    arguments, stage, disk = [*overrides, *STAGE1, "--force", "stage1"], folder / "stage1", tmp_path / "disk"
    for path in (stage, disk):
        path.mkdir()
    (stage / "checkpoints").symlink_to(disk)
    for path in (stage / MARK, disk / MARK):
        path.touch()
    process = start(PYTHON, arguments)
    wait_for_step(process, folder, "stage1", 5)
    interrupt(process)
    assert not (stage / MARK).exists()
    assert not (disk / MARK).exists()
    assert list(disk.glob("step-*"))
    (stage / MARK).touch()
    output = run(PYTHON, arguments)
    assert "--force: resuming the redo of stage1" in output
    assert (stage / MARK).exists()
    assert_same_end(folder, whole)
    process = start(TORCHRUN, arguments, start_new_session=True)  # two processes agree that this is another redo
    wait_for_removal(process, stage / MARK)
    wait_for_step(process, folder, "stage1", 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (stage / "checkpoints").is_symlink()


@pytest.mark.slow
def test_a_pipeline_goes_on_with_the_first_step_that_is_not_redone(copy_run, whole):
    """Also where it has restarted a stage itself. After its end the same command redoes all steps."""
    folder, overrides = copy_run("run")
    settings = [*overrides, *STAGE1[2:], "cluster.restart_backoff_seconds=0.1", "evaluation.bootstrap_samples=0"]
    arguments = [*settings, "--force", "data"]
    pipeline = start(PIPELINE, arguments)
    wait_for_step(pipeline, folder, "stage1", 4)
    (folder / "stage1" / MARK).touch()
    find_tuning(pipeline).kill()
    wait_for_step(pipeline, folder, "stage1", 10)
    interrupt(pipeline)
    written = (folder / "cf" / "summary.json").stat().st_mtime_ns
    output = run(PIPELINE, arguments)
    assert "--force: resuming the redo of data, cf, stage1, stage2, eval" in output
    assert "data: redone already" in output
    assert "cf: redone already" in output
    assert (folder / "cf" / "summary.json").stat().st_mtime_ns == written
    assert (folder / "stage1" / MARK).exists()
    assert_same_end(folder, whole)
    assert not (folder / ".redo.json").exists()
    pipeline = start(PIPELINE, arguments)
    wait_for_removal(pipeline, folder / "cf" / "summary.json")
    interrupt(pipeline)
    assert json.loads((folder / ".redo.json").read_text())["begun"].keys() == {"data", "cf"}
