"""Machine faults injected into real processes: a rerun gives the result of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.distributed.conftest import STAGE1, run, start, wait_for_step
from tests.distributed.test_tuning import PYTHON, TORCHRUN, assert_same_training

PRODUCT = "stage1/adapter/adapter_model.safetensors"


def assert_same_end(folder, whole):
    assert_same_training(folder, whole, stages=("stage1",), tolerance=0.0)
    assert (folder / PRODUCT).read_bytes() == (whole / PRODUCT).read_bytes()
    ours, theirs = (json.loads((run / "stage1" / "summary.json").read_text()) for run in (folder, whole))
    for key in ("best_valid", "last_train", "global_steps", "content_hash"):
        assert ours[key] == theirs[key], key


def list_checkpoints(folder):
    return sorted(path.name for path in (folder / "stage1" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_and_the_second_one_stops_at_once(copy_run, whole):
    folder, overrides = copy_run("run")
    process = start(PYTHON, [*overrides, *STAGE1])
    wait_for_step(process, folder, "stage1", 5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "press Ctrl-C again to stop at once" in output
    assert "Traceback" not in output
    newest = int(list_checkpoints(folder)[-1].removeprefix("step-").split(".")[0])
    assert newest >= 5
    process = start(PYTHON, [*overrides, *STAGE1])
    wait_for_step(process, folder, "stage1", newest + 1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    run(PYTHON, [*overrides, *STAGE1])
    assert_same_end(folder, whole)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_stops_after_the_step_and_damage_falls_back_one_checkpoint(copy_run, whole, name):
    """A stop request writes a checkpoint and exits with 75. Then the newest checkpoint is damaged in two ways."""
    folder, overrides = copy_run("run")
    process = start(PYTHON, [*overrides, *STAGE1])
    wait_for_step(process, folder, "stage1", 5)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert "run the same command again" in output
    _, newest = list_checkpoints(folder)
    path = folder / "stage1" / "checkpoints" / newest
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data if name == "SIGTERM" else data[:-100])
    output = run(PYTHON, [*overrides, *STAGE1])
    assert f"{newest}: the checkpoint is damaged" in output
    assert_same_end(folder, whole)


@pytest.mark.slow
def test_a_full_disk_then_space(copy_run, whole, tmp_path):
    """The file system is full when a checkpoint is due; later it has space."""
    folder, overrides = copy_run("run")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        (folder / "stage1").mkdir()
        (folder / "stage1" / "checkpoints").symlink_to(disk)
        process = start(PYTHON, [*overrides, *STAGE1])
        wait_for_step(process, folder, "stage1", 5)
        filler = disk / "filler"
        fill = subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True, text=True)
        assert "No space left" in fill.stderr
        output, _ = process.communicate()
        assert process.returncode == 3, output
        assert "No space left on device (0.0 MiB free" in output
        assert "Traceback" not in output
        kept = list_checkpoints(folder)
        assert kept
        filler.unlink()
        run(PYTHON, [*overrides, *STAGE1])
        assert_same_end(folder, whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_checkpoints_by_time(copy_run, whole):
    """Checkpoints due by time alone, by rank 0's clock on both ranks."""
    folder, overrides = copy_run("run")
    settings = ["stage1.checkpoint_every_steps=100", "stage1.checkpoint_every_minutes=1e-4"]
    process = start(TORCHRUN, [*overrides, *STAGE1, *settings], start_new_session=True)
    wait_for_step(process, folder, "stage1", 8)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list_checkpoints(folder)
    run(PYTHON, [*overrides, *STAGE1])  # started by two processes, finished by one
    assert_same_training(folder, whole, stages=("stage1",))


PIPELINE = [sys.executable, "launch/run_pipeline.py"]


def find_tuning(pipeline) -> psutil.Process:
    """Return the process that a pipeline started for a stage."""
    while True:
        for process in psutil.Process(pipeline.pid).children(recursive=True):
            if any(part.endswith("train.py") for part in process.cmdline()):
                return process
        assert pipeline.poll() is None, pipeline.stdout.read()
        time.sleep(0.05)


@pytest.mark.slow
def test_the_pipeline_restarts_killed_stages_and_forwards_signals(copy_run, whole):
    """The stage is killed, then stopped; then the pipeline is stopped, then killed."""
    folder, overrides = copy_run("run")
    settings = [*overrides, *STAGE1[2:], "cluster.restart_backoff_seconds=0.1", "evaluation.bootstrap_samples=0"]
    status = folder / "status.json"
    pipeline = start(PIPELINE, settings)
    wait_for_step(pipeline, folder, "stage1", 4)
    find_tuning(pipeline).kill()
    wait_for_step(pipeline, folder, "stage1", 10)
    find_tuning(pipeline).terminate()
    wait_for_step(pipeline, folder, "stage1", 16)
    assert json.loads(status.read_text())["restarts"] == 2
    pipeline.send_signal(signal.SIGUSR1)
    output, _ = pipeline.communicate(timeout=60)
    assert pipeline.returncode == 75, output
    assert "WorkerLostError: train.py: a process was killed by SIGKILL" in output
    ended = json.loads(status.read_text())
    assert (ended["state"], ended["error"], ended["retryable"]) == ("interrupted", "Preempted", True)

    pipeline = start(PIPELINE, settings)
    wait_for_step(pipeline, folder, "stage1", 22)
    orphan = find_tuning(pipeline)
    pipeline.kill()
    pipeline.communicate()
    assert orphan.is_running()
    run(PIPELINE, settings)
    assert not orphan.is_running()  # the pipeline that took over the run ended it
    assert_same_end(folder, whole)
    ended = json.loads(status.read_text())
    assert (ended["state"], ended["exit_code"], ended["retryable"]) == ("done", 0, False)
