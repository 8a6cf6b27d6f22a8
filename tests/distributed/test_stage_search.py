"""Search for stage settings: on a real local Ray, killed and resumed, and with settings that cannot be searched."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from collm_dist.config.loader import load_config
from collm_dist.errors import ConfigError
from collm_dist.monitoring import read_metrics
from collm_dist.orchestration.stage_search import run_stage_search
from collm_dist.runs.run_dir import RunDir
from tests.conftest import REPOSITORY

SETTINGS = [
    "stage1.max_steps=12", "stage1.eval_every_steps=3", "stage1.checkpoint_every_steps=3", "stage1.learning_rate=1e-3",
    "stage1.early_stop_patience=9", "monitoring.tensorboard=false", "stage_search.num_trials=3",
    "stage_search.reduction_factor=2", "stage_search.grace_validations=1", "cluster.ray_num_cpus=2",
]  # fmt: skip
SPACE = "stage_search.space={stage1.learning_rate: {log_uniform: [1.0e-4, 1.0e-1]}, lora.rank: {choice: [2, 4]}}"


def start(overrides, *more, **options):
    config = str(REPOSITORY / "configs" / "tiny_cpu.yaml")
    command = [sys.executable, "launch/search.py", "--config", config, "--step", "stage1", *overrides, *SETTINGS, *more]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes, **options)


def kill_during_the_second_trial(process, folder):
    """Kill the search once a trial has ended and another one has validated."""
    deadline = time.monotonic() + 200
    while True:
        ended = list(folder.glob("trials/*/metrics.jsonl"))
        running = [log for log in folder.glob("trials/*/run/stage1/metrics.jsonl") if read_metrics(log)]
        if ended and any(log.parents[2] / "metrics.jsonl" not in ended for log in running):
            break
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(3)  # Ray's processes end with their driver
    return {path.parent.name: path.read_bytes() for path in ended}


@pytest.mark.slow
def test_a_killed_search_goes_on_and_leaves_leaderboard_and_best_config(copy_run):
    run, overrides = copy_run("searched")
    folder = run / "stage1_search"
    before = kill_during_the_second_trial(start(overrides, SPACE, start_new_session=True), folder)
    assert not (folder / "summary.json").exists()
    process = start(overrides, SPACE)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "stage_search: resumes; 1 trials are done" in output
    for name, log in before.items():
        assert (folder / "trials" / name / "metrics.jsonl").read_bytes() == log
    table = pq.read_table(folder / "leaderboard.parquet").to_pylist()
    assert len(table) == 3
    assert {row["state"] for row in table} <= {"finished", "stopped"}
    values = [row["valid_auc"] for row in table]
    assert values == sorted(values, reverse=True)
    own = next(row for row in table if row["trial"] == 0)
    assert (own["stage1.learning_rate"], own["lora.rank"]) == (1e-3, 2)
    best = next(row for row in table if row["state"] == "finished")
    config = load_config(folder / "best.yaml")
    assert (config.stage1.learning_rate, config.lora.rank) == (best["stage1.learning_rate"], best["lora.rank"])
    assert config.run.dir == str(run)
    assert (folder / "leaderboard.png").stat().st_size > 10_000
    assert not list(folder.glob("trials/*/run"))  # weights of trials are not kept
    # The best trial is what the stage itself gives with its settings.
    again = [sys.executable, "launch/train.py", "--config", str(folder / "best.yaml"), "--stage", "1"]
    subprocess.run(again, cwd=REPOSITORY, check=True, capture_output=True)
    summary = json.loads((run / "stage1" / "summary.json").read_text())["best_valid"]
    assert summary["auc"] == pytest.approx(best["valid_auc"], abs=1e-9)
    assert summary["step"] == best["best_epoch"]
    done = start(overrides, SPACE)
    output, _ = done.communicate(timeout=100)
    assert (done.returncode, "done already" in output) == (0, True)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{cf.embedding_dim: {choice: [4, 8]}}", "changes the step 'cf', which trials of stage1 share; search it with"),
        ("{stage1.learning_rat: {uniform: [1, 2]}}", "stage1.learning_rat: no such setting"),
        ("{stage1.learning_rate: {uniform: [-1, 2]}}", "should be greater than 0"),
        ("{lora.rank: {range: [1, 2]}}", "range"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_work_starts(copy_run, space, message):
    run, overrides = copy_run("refused")
    with pytest.raises(ConfigError, match=message):
        run_stage_search(
            load_config(REPOSITORY / "configs" / "tiny_cpu.yaml", [*overrides, f"stage_search.space={space}"]),
            RunDir(run),
            "stage1",
        )
    assert not (run / "stage1_search").exists()
