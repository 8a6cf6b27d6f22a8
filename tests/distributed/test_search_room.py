"""Search for stage settings on a real local Ray that has too little room, or whose trials cannot all be compared."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import threading
import time

import pyarrow.parquet as pq
import pytest

from collm_dist.config.loader import load_config
from collm_dist.orchestration.stage_search import run_stage_search
from collm_dist.runs.run_dir import RunDir
from tests.distributed.conftest import REPOSITORY, prepare_run

SHORT = ["stage1.max_steps=2", "stage1.eval_every_steps=1", "stage1.early_stop_patience=9", "stage1.warmup_steps=0",
         "monitoring.tensorboard=false", "stage_search.reduction_factor=2", "stage_search.grace_validations=9",
         "cluster.ray_num_cpus=2"]  # fmt: skip

ENDLESS = ["stage1.max_steps=9999", "stage1.num_epochs=9999", "stage1.early_stop_patience=9999",
           "stage_search.grace_validations=9999"]  # fmt: skip


@pytest.fixture(scope="module")
def one_sided_run(tmp_path_factory, tiny_ratings, tiny_backbone_dir):
    """Return (folder, overrides) of a run with data and CF model, of users who like all or none of their items."""
    inputs = tmp_path_factory.mktemp("one_sided")
    shutil.copy(tiny_ratings / "items.csv", inputs)
    with (tiny_ratings / "ratings.csv").open() as source, (inputs / "ratings.csv").open("w", newline="") as target:
        rows = list(csv.DictReader(source))
        writer = csv.DictWriter(target, rows[0])
        writer.writeheader()
        writer.writerows(row | {"rating": 5 if int(row["user_id"]) % 2 else 1} for row in rows)
    return prepare_run(inputs / "run", inputs, tiny_backbone_dir)


@pytest.fixture
def search(one_sided_run, tmp_path, monkeypatch):
    """Return a function that searches stage 1 in this process, and returns the folder."""

    def run(*settings, num_trials=3):
        source, overrides = one_sided_run
        folder = tmp_path / "searched"
        shutil.copytree(source, folder)
        monkeypatch.chdir(REPOSITORY)
        settings = [*overrides, f"run.dir={folder}", *SHORT, f"stage_search.num_trials={num_trials}", *settings]
        config = load_config(REPOSITORY / "configs" / "tiny_cpu.yaml", settings)
        run_stage_search(config, RunDir(folder), "stage1")
        return folder / "stage1_search"

    return run


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_more_parallel_trials_than_fit_all_finish(search):
    folder = search("stage_search.parallel_trials=3")
    rows = pq.read_table(folder / "leaderboard.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["finished"] * 3
    assert len({row["stage1.learning_rate"] for row in rows}) == 3
    assert not list(folder.glob("trials/*/run"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_invalid_combination_fails_its_trial_alone_and_logloss_compares_the_others(search, capsys):
    # Each value alone is valid; the loss of the LLM alone needs an anchor. Seed 0 draws one without for trial 2.
    space = "{anchor.kind: {choice: [as_of, null]}, stage1.llm_loss_weight: {choice: [null, 0.1]}}"
    folder = search(f"stage_search.space={space}", "anchor.kind=as_of", "stage1.select_metric=uauc", num_trials=4)
    rows = pq.read_table(folder / "leaderboard.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["finished"] * 3 + ["failed"]
    failed = rows[-1]
    assert (failed["trial"], failed["anchor.kind"], failed["stage1.llm_loss_weight"]) == (2, None, 0.1)
    assert "llm_loss_weight 0.1 adds the loss" in failed["error"]
    losses = [row["valid_logloss"] for row in rows[:3]]
    assert losses == sorted(losses)
    assert {row["valid_uauc"] for row in rows} == {None}
    printed = capsys.readouterr().out
    assert "trial 2 failed: anchor.kind=None stage1.llm_loss_weight=0.1: stage1" in printed
    assert "Trial 2: stage1" in printed
    assert "uauc is undefined on the validation rows" in printed


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_interrupted_search_stops_although_a_trial_has_no_place(search, tmp_path):
    def interrupt():
        logs = tmp_path / "searched" / "stage1_search" / "trials"
        while sum("train/loss" in log.read_text() for log in logs.glob("*/run/stage1/metrics.jsonl")) < 2:
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
