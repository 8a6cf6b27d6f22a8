"""The search for CF settings as a command: on a real local Ray, killed in the middle, and asked for nonsense."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import yaml

from collm_dist.config_io import load_config
from collm_dist.monitoring import read_metrics
from tests.integration.test_pretrain_cf import make_config
from tests.unit.evaluation_run import write_data_step

NUM_TRIALS = 4


@pytest.fixture
def search(tmp_path, repository):
    """Return (run dir, config path, function that starts the command)."""
    run_dir = write_data_step(tmp_path / "run")
    for path in (run_dir.step_dir("data") / "shards").glob("test-*"):
        path.unlink()  # whatever reads them fails
    config = make_config(tmp_path / "run", num_epochs=40, early_stop_patience=40, checkpoint_every_epochs=2)
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
        command = [sys.executable, str(repository / "launch" / "search_cf.py"), "--config", str(path), *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, **pipes, **options)

    return run_dir, start


def list_logs(folder):
    return {path.parent.name: path for path in (folder / "trials").glob("*/metrics.jsonl")}


def test_a_killed_search_goes_on_and_leaves_leaderboard_and_best_config(search):
    run_dir, start = search
    folder = run_dir.path / "cf_search"
    process = start(start_new_session=True)
    deadline = time.monotonic() + 90
    while sum(len(read_metrics(path)) for path in list_logs(folder).values()) < 60:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {name: len(read_metrics(path)) for name, path in list_logs(folder).items()}
    assert not (folder / "summary.json").exists()
    time.sleep(3)  # Ray's processes end with their driver

    process = start()
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    for name, count in before.items():
        steps = [line["step"] for line in read_metrics(list_logs(folder)[name])]
        assert steps == [*range(1, len(steps) + 1)]  # no epoch twice, none missing
        assert len(steps) >= count - 2  # what lay after the last checkpoint

    table = pq.read_table(folder / "leaderboard.parquet").to_pylist()
    assert len(table) == NUM_TRIALS
    values = [row["valid_auc"] for row in table if row["state"] == "finished"]
    assert values == sorted(values, reverse=True)
    assert (folder / "leaderboard.png").stat().st_size > 10_000
    best = load_config(folder / "best.yaml", [])
    assert best.cf.learning_rate == pytest.approx(table[0]["cf.learning_rate"])
    assert best.cf.embedding_dim == table[0]["cf.embedding_dim"]
    trials = json.loads((folder / "summary.json").read_text())["trials"]
    assert all(set(trial["metrics"]) == {"auc", "uauc", "logloss"} for trial in trials)
    assert "test was not scored" in output

    process = start()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "done already" in output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cf_search.space={learning_rat: {uniform: [1, 2]}}", "did you mean learning_rate?"),
        ("cf_search.space={learning_rate: {log_uniform: [0, 2]}}", "log_uniform needs 0 < low < high"),
        ("cf_search.grace_epochs=99", "cf_search.grace_epochs 99 exceeds cf.num_epochs 40"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_work_starts(search, override, message):
    run_dir, start = search
    process = start(override)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert message in output
    assert not (run_dir.path / "cf_search" / "trials").exists()
