"""A rank that dies, fails or hangs ends the job soon with an explanation, and a rerun resumes."""

from __future__ import annotations

import json
import signal
import time

import psutil
import pytest

from collm_dist.runs.error_file import ERROR_FILE_VARIABLE
from tests.distributed.conftest import REPOSITORY, STAGE1, run, start, wait_for_step
from tests.distributed.test_tuning import DEEPSPEED, TORCHRUN, assert_same_training

BROKEN = [*TORCHRUN[:-1], "tests/distributed/broken_train.py"]
MINUTE = 60


def find_worker(launcher, rank: int) -> psutil.Process:
    """Return the training process of a rank below a launcher."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if process.environ().get("RANK") == str(rank) and "train.py" in " ".join(process.cmdline()):
            return process
    raise AssertionError(f"no process has rank {rank}")


@pytest.mark.parametrize("launcher", [TORCHRUN, pytest.param(DEEPSPEED, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_job_within_a_minute(copy_run, whole, launcher):
    folder, overrides = copy_run("run")
    process = start(launcher, [*overrides, *STAGE1])
    wait_for_step(process, folder, "stage1", 8)
    worker = find_worker(process, 1)
    worker.kill()
    killed_at = time.monotonic()
    output, _ = process.communicate(timeout=MINUTE)
    assert process.returncode != 0
    print(f"ended after {time.monotonic() - killed_at:.1f} s", output)
    assert "WorkerLostError: process 0 of 2, stage1, step" in output
    assert "Run the same command again" in output
    run(launcher, [*overrides, *STAGE1])
    assert_same_training(folder, whole, stages=("stage1",))


@pytest.mark.slow
def test_the_first_of_several_errors_is_reported(copy_run, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "raise:1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(tmp_path / "error.json"))
    _, overrides = copy_run("run")
    process = start(BROKEN, [*overrides, *STAGE1])
    output, _ = process.communicate(timeout=MINUTE)
    assert process.returncode != 0
    first, second = output.find("only this rank has a fault"), output.find("WorkerLostError: process 0")
    assert 0 <= first < second, output
    report = json.loads((tmp_path / "error.json").read_text())
    assert report["exit_code"] == 1
    assert "only this rank has a fault" in report["message"]


@pytest.mark.slow
def test_a_hanging_rank_ends_the_job_with_all_stack_traces(copy_run, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "hang:1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(tmp_path / "error.json"))
    folder, overrides = copy_run("run")
    process = start(BROKEN, [*overrides, *STAGE1, "cluster.collective_timeout_minutes=0.1"])
    output, _ = process.communicate(timeout=MINUTE)
    assert process.returncode != 0
    assert "process 1 of 2, stage1, step 2: no step and no validation batch completed for 0.1 minutes" in output
    report = json.loads((tmp_path / "error.json").read_text())
    assert (report["error"], report["exit_code"], report["retryable"]) == ("WorkerLostError", 76, True)
    stacks = [(folder / "stage1" / f"stacks-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "in break_down" in stacks[1]
    assert "in _agree" in stacks[0] or "all_reduce" in stacks[0]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), [(TORCHRUN, 1), (DEEPSPEED, 0)])
def test_a_suspended_rank_is_noticed_by_its_peers(copy_run, whole, launcher, rank):
    """No collective times out and no connection closes: only heartbeats show it. DeepSpeed's rank 0 keeps the store."""
    folder, overrides = copy_run("run")
    process = start(launcher, [*overrides, *STAGE1])
    wait_for_step(process, folder, "stage1", 8)
    find_worker(process, rank).send_signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    output, _ = process.communicate(timeout=3 * MINUTE)  # torchrun waits 30 s for a process that ignores SIGTERM
    print(f"ended after {time.monotonic() - stopped_at:.1f} s")
    assert f"no heartbeat from process {rank} for 30 seconds" in output
    run(TORCHRUN, [*overrides, *STAGE1])
    assert_same_training(folder, whole, stages=("stage1",))


@pytest.mark.slow
def test_a_pause_of_all_ranks_is_not_a_loss(copy_run, whole):
    """As if the machine were suspended: no rank takes its peers for lost."""
    folder, overrides = copy_run("run")
    process = start(TORCHRUN, [*overrides, *STAGE1])
    wait_for_step(process, folder, "stage1", 8)
    workers = [find_worker(process, rank) for rank in (0, 1)]
    for worker in workers:
        worker.suspend()
    time.sleep(40)
    for worker in workers:
        worker.resume()
    output, _ = process.communicate(timeout=3 * MINUTE)
    assert process.returncode == 0, output
    assert_same_training(folder, whole, stages=("stage1",))
