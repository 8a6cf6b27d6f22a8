"""Search command for CF settings: on a real local Ray, killed and resumed, and with invalid settings."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from collm_dist.cf.cross_fit import fit_job
from collm_dist.cf.jobs import Job
from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.errors import ConfigError
from collm_dist.monitoring import read_metrics
from collm_dist.orchestration.cf_search import run_search
from collm_dist.orchestration.pretrain import run_pretrain
from tests.integration.test_pretrain_cf import make_config
from tests.unit.evaluation_run import write_data_step
from tests.unit.test_cf_model_files import ITEMS, USERS, write_tables
from tests.unit.test_own_cf_model import write_vectors

NUM_TRIALS, NUM_EPOCHS = 4, 40


@pytest.fixture
def search(tmp_path, repository):
    """Return (run dir, config path, function that starts the command)."""
    run_dir = write_data_step(tmp_path / "run")
    config = make_config(
        tmp_path / "run", num_epochs=NUM_EPOCHS, early_stop_patience=NUM_EPOCHS, checkpoint_every_epochs=2
    )
    record = config.model_dump(mode="json")
    record["cf_search"] = {
        "space": {"learning_rate": {"log_uniform": [1e-4, 1e-1]}, "embedding_dim": {"choice": [4, 8]}},
        "num_trials": NUM_TRIALS,
        "grace_epochs": 10,
        "parallel_trials": 2,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(record))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

    def start(*overrides, **options):
        command = [
            sys.executable,
            str(repository / "launch" / "search.py"),
            "--step",
            "cf",
            "--config",
            str(path),
            *overrides,
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, **pipes, **options)

    return run_dir, start


def read_logs(folder):
    """Each trial's log, by its number; the time that an epoch took tells it from the same epoch done again."""
    return {path.parent.name: read_metrics(path) for path in (folder / "trials").glob("*/metrics.jsonl")}


def kill_once_a_trial_has_finished(process, folder):
    deadline = time.monotonic() + 90
    while not (results := list((folder / "trials").glob("*/checkpoints/result.json"))):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(3)  # Ray's processes end with their driver
    return results


@pytest.mark.slow
def test_a_killed_search_goes_on_and_leaves_leaderboard_and_best_config(search, tmp_path):
    run_dir, start = search
    folder = run_dir.path / "cf_search"
    results = kill_once_a_trial_has_finished(start(start_new_session=True), folder)
    before = read_logs(folder)
    finished = {path.parent.parent.name for path in results}
    assert all(len(before[name]) == NUM_EPOCHS for name in finished)
    # fit_job scores every split that it has loaded and leaves the figures here.
    assert all(set(json.loads(path.read_text())["metrics"]) == {"train", "valid"} for path in results)
    assert not (folder / "summary.json").exists()

    process = start()
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    after = read_logs(folder)
    for name, lines in before.items():
        kept = len(lines) - (name not in finished)  # checkpoints are made every second epoch
        assert after[name][:kept] == lines[:kept]
    assert all(after[name] == before[name] for name in finished)

    table = pq.read_table(folder / "leaderboard.parquet").to_pylist()
    assert len(table) == NUM_TRIALS
    values = [row["valid_auc"] for row in table]
    assert values == sorted(values, reverse=True)
    assert (folder / "leaderboard.png").stat().st_size > 10_000
    best = load_config(folder / "best.yaml")
    row = next(row for row in table if row["state"] == "finished")
    job = Job(run_dir.step_dir("data"), tmp_path / "again", "key", best.cf, best.run.seed)
    fit_job(job, torch.device("cpu"), 0, 1, lambda *_: None)
    again = job.read_result()
    assert again["best_epoch"] == row["best_epoch"]
    for name, value in again["metrics"]["valid"].items():
        assert value == pytest.approx(row[f"valid_{name}"], abs=1e-6)

    stamp = (folder / "summary.json").stat().st_mtime_ns
    assert run_search(load_config(tmp_path / "config.yaml"), run_dir)["best"] == row["trial"]
    assert (folder / "summary.json").stat().st_mtime_ns == stamp  # done already


@pytest.mark.slow
def test_trials_read_item_texts_and_the_best_one_is_what_the_cf_step_trains(tmp_path):
    """Trials of one width are equal, those of different widths differ. Measured: the step's metrics are equal."""
    run_dir = write_data_step(tmp_path, taste=True)
    record = make_config(tmp_path, num_epochs=6, item_text=3).model_dump(mode="json")
    record["cf_search"] = {
        "space": {"item_text": {"choice": [None, 3, 8]}},
        "num_trials": 6,
        "grace_epochs": 6,
        "parallel_trials": 2,
    }
    run_search(Config.model_validate(record), run_dir)
    folder = run_dir.path / "cf_search"
    by_width = {}
    for row in pq.read_table(folder / "leaderboard.parquet").to_pylist():
        assert row["epochs"] == 6, row["error"]  # ASHA stops some after the last epoch
        by_width.setdefault(row["cf.item_text"], set()).add(row["valid_logloss"])
    assert by_width.keys() == {None, 3, 8}
    assert all(len(values) == 1 for values in by_width.values())
    assert len(set.union(*by_width.values())) == 3
    assert not (folder / "item_text").exists()
    best = load_config(folder / "best.yaml")
    assert best.cf.item_text is not None
    summary = run_pretrain(best, run_dir)
    assert summary["metrics"]["valid"]["logloss"] == pytest.approx(by_width[best.cf.item_text].pop(), abs=1e-12)


@pytest.mark.slow
def test_trials_find_relative_vectors(tmp_path, monkeypatch):
    run_dir = write_data_step(tmp_path)
    write_tables(run_dir, USERS, ITEMS)
    monkeypatch.chdir(tmp_path)
    write_vectors("items.parquet", ITEMS, np.eye(len(ITEMS), 3))
    config = make_config(tmp_path, model="table", item_vectors="items.parquet", num_epochs=2)
    search = {"space": {"learning_rate": {"choice": [1e-2]}}, "num_trials": 1, "grace_epochs": 1}
    summary = run_search(Config.model_validate(config.model_dump(mode="json") | {"cf_search": search}), run_dir)
    assert summary["best"] == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cf_search.space={learning_rat: {uniform: [1, 2]}}", "did you mean learning_rate?"),
        pytest.param(
            "cf_search.grace_epochs=99", "cf_search.grace_epochs 99 exceeds cf.num_epochs 40", marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_before_work_starts(search, override, message):
    run_dir, start = search
    process = start(override)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert message in output
    assert not (run_dir.path / "cf_search" / "trials").exists()


def test_the_models_of_all_trials_are_checked_before_work_starts(tmp_path):
    run_dir = write_data_step(tmp_path)
    record = make_config(tmp_path).model_dump(mode="json")
    record["cf_search"] = {"space": {"model": {"choice": ["mf", "lightgnc"]}}, "num_trials": 9}
    with pytest.raises(ConfigError, match=r"'lightgnc' is neither .*did you mean lightgcn"):
        run_search(Config.model_validate(record), run_dir)
    assert not (run_dir.path / "cf_search" / "trials").exists()
