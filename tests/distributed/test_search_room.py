"""Search for stage settings on a real local Ray that has too little room, or whose trials cannot all be compared."""

from __future__ import annotations

import os
import signal
import threading
import time

import pyarrow.parquet as pq
import pytest

from collm_dist.config.loader import load_config
from collm_dist.orchestration.stage_search import run_stage_search
from collm_dist.runs.run_dir import RunDir
from tests.conftest import REPOSITORY

SHORT = ["stage1.max_steps=2", "stage1.eval_every_steps=1", "stage1.early_stop_patience=9", "stage1.warmup_steps=0",
         "monitoring.tensorboard=false", "stage_search.reduction_factor=2", "stage_search.grace_validations=9",
         "cluster.ray_num_cpus=2"]  # fmt: skip

ENDLESS = ["stage1.max_steps=9999", "stage1.num_epochs=9999", "stage1.early_stop_patience=9999",
           "stage_search.grace_validations=9999"]  # fmt: skip


@pytest.fixture
def search(copy_run, monkeypatch):
    """Return a function that searches stage 1 in this process, and returns the folder."""

    def run(*settings, num_trials=3):
        folder, overrides = copy_run("searched")
        monkeypatch.chdir(REPOSITORY)
        settings = [*overrides, *SHORT, f"stage_search.num_trials={num_trials}", *settings]
        config = load_config(REPOSITORY / "configs" / "tiny_cpu.yaml", settings)
        run_stage_search(config, RunDir(folder), "stage1")
        return folder / "stage1_search"

    return run


@pytest.mark.timeout(300)
def test_more_parallel_trials_than_fit_all_finish(search):
    folder = search("stage_search.parallel_trials=3")
    rows = pq.read_table(folder / "leaderboard.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["finished"] * 3
    assert len({row["stage1.learning_rate"] for row in rows}) == 3
    assert not list(folder.glob("trials/*/run"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_interrupted_search_stops_although_a_trial_has_no_place(search, tmp_path):
    def interrupt():
        while len(list(tmp_path.glob("searched/stage1_search/trials/*/run/stage1/metrics.jsonl"))) < 2:
            time.sleep(0.1)
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    times: list[float] = []
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        search("stage_search.parallel_trials=3", *ENDLESS)
    assert time.monotonic() - times[0] < 60
    folders = sorted((tmp_path / "searched" / "stage1_search" / "trials").glob("*"))
    assert len([folder for folder in folders if list(folder.glob("run/stage1/checkpoints/*"))]) == 2
