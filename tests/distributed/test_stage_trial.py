"""Processes of a trial of a search for stage settings, also below DeepSpeed's launcher, and the lock of its run."""

from __future__ import annotations

import json
import os
import time

import psutil
import pytest

from collm_dist.config.loader import load_config
from collm_dist.monitoring import read_metrics
from collm_dist.orchestration import stage_trial
from collm_dist.orchestration.stage_trial import StageTrial, TrialPlan
from collm_dist.runs.lock import LOCK_NAME, STALE_SECONDS
from collm_dist.runs.run_dir import RunDir
from tests.distributed.conftest import REPOSITORY

ENDLESS = ["stage1.max_steps=9999", "stage1.num_epochs=9999", "stage1.early_stop_patience=9999",
           "stage1.eval_every_steps=2", "monitoring.tensorboard=false"]  # fmt: skip

SHORT = ["stage1.max_steps=2", "stage1.eval_every_steps=1", "stage1.warmup_steps=0", "monitoring.tensorboard=false"]


@pytest.fixture
def begin(prepared_run, tmp_path):
    """Return a function that starts a trial; after the test none of its processes is left."""
    folder = tmp_path / "trials" / "000"

    def start(*settings, num_gpus=0):
        base, overrides = prepared_run
        config = load_config(REPOSITORY / "configs" / "tiny_cpu.yaml", [*overrides, f"run.dir={base}", *settings])
        return StageTrial(TrialPlan(RunDir(base), "stage1", num_gpus, REPOSITORY), config, folder), folder

    yield start
    stage_trial.end_trial_processes(folder)


@pytest.fixture
def begin_with_launcher(begin, monkeypatch):
    """Return a function that starts an endless trial as on a machine with a GPU, and waits until it validates."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as Ray sets it for an actor with a GPU
    monkeypatch.setenv("LOCAL_SIZE", "1")  # the devices of DeepSpeed's CPU accelerator

    def start():
        trial, folder = begin(*ENDLESS, num_gpus=1)
        deadline = time.monotonic() + 200
        while not trial.read_state().validations:
            assert not trial.read_state().has_ended, (folder / "output.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(list_processes(folder)) >= 3  # runner, launcher and worker
        return trial, folder

    return start


def list_processes(folder):
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("COLLM_SEARCH_TRIAL") == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_trial_trains_stage_1_also_where_a_night_would_reuse_it(begin):
    _, folder = begin(*SHORT, "stage1.refresh_every_days=60")
    assert load_config(folder / "config.yaml").stage1.refresh_every_days is None


@pytest.mark.slow
def test_a_stopped_trial_leaves_a_checkpoint_and_no_worker(begin_with_launcher):
    trial, folder = begin_with_launcher()
    trial.stop()
    assert list_processes(folder) == []
    assert list(folder.glob("run/stage1/checkpoints/*"))
    trial.stop()  # of an ended trial: nothing to do


@pytest.mark.slow
def test_a_trial_that_hangs_is_killed_before_its_folder_is_deleted(begin_with_launcher, monkeypatch):
    monkeypatch.setattr(stage_trial, "_STOP_SECONDS", 1.0)
    trial, folder = begin_with_launcher()
    for process in list_processes(folder):
        process.suspend()
    trial.end()
    assert list_processes(folder) == []
    assert read_metrics(folder / "metrics.jsonl")
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_worker(begin_with_launcher):
    trial, folder = begin_with_launcher()
    for process in list_processes(folder):
        if any("deepspeed.launcher" in part for part in process.cmdline()):
            process.kill()
    while not trial.read_state().has_ended:
        time.sleep(0.1)
    trial.end()
    assert list_processes(folder) == []


@pytest.fixture
def lock(tmp_path):
    """Lock of a process on another host, whose last heartbeat was just now."""
    path = tmp_path / "trials" / "000" / "run" / LOCK_NAME
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": "lost-node", "pid": 4711, "started": 1.0, "token": "of the lost node"}))
    return path


def wait_for_end(trial):
    while not (state := trial.read_state()).has_ended:
        time.sleep(0.1)
    return state


def test_a_trial_of_a_lost_node_waits_until_the_lock_is_stale(begin, lock):
    trial, folder = begin(*SHORT)
    assert not trial.read_state().has_ended
    assert list_processes(folder) == []
    os.utime(lock, (time.time() - STALE_SECONDS - 1,) * 2)
    state = wait_for_end(trial)
    assert state.error == ""
    assert [step for step, _ in state.validations] == [1, 2]


def test_a_trial_that_waits_for_a_lock_can_be_stopped(begin, lock):
    trial, folder = begin(*SHORT)
    assert list_processes(folder) == []
    trial.end()
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_a_lock_that_stays_fresh_is_named(begin, lock, monkeypatch):
    monkeypatch.setattr(stage_trial, "_LOCK_SECONDS", 0.0)
    trial, _ = begin(*SHORT)
    assert "is being written by process 4711 on lost-node" in wait_for_end(trial).error
