"""Profiler traces: complete, readable, without effect on results."""

import gzip
import json
import logging
import os

import pytest
import torch

from collm_dist.config.loader import load_config
from collm_dist.errors import ConfigError
from collm_dist.monitoring import StepProfiler
from collm_dist.runs.run_dir import RunDir


def read_trace(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {event.get("name") for event in json.load(file)["traceEvents"]}


def run_steps(profiler, steps):
    for step in steps:
        with profiler.watch(step):
            torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.stop()


def test_trace_holds_the_selected_steps(tmp_path):
    folder = tmp_path / "stage1" / "profile"
    run_steps(StepProfiler(folder, (2, 3), start_step=0, total_steps=5), range(1, 6))
    assert sorted(path.name for path in folder.iterdir()) == ["steps-2-3.operators.txt", "steps-2-3.pt.trace.json.gz"]
    names = read_trace(folder / "steps-2-3.pt.trace.json.gz")
    assert {"step 2", "step 3", "aten::mm"} <= names
    assert not {"step 1", "step 4"} & names
    table = (folder / "steps-2-3.operators.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU" in table


def test_early_end_writes_a_partial_trace(tmp_path):
    run_steps(StepProfiler(tmp_path / "profile", (2, 9), start_step=0, total_steps=9), range(1, 4))
    assert {"step 2", "step 3"} <= read_trace(tmp_path / "profile" / "steps-2-3.pt.trace.json.gz")


@pytest.mark.parametrize("start, total", [(2, 9), (0, 1)])
def test_warns_of_steps_that_will_not_run(tmp_path, caplog, start, total):
    with caplog.at_level(logging.WARNING):
        profiler = StepProfiler(tmp_path / "stage2" / "profile", (2, 4), start_step=start, total_steps=total)
    run_steps(profiler, range(start + 1, total + 1))
    assert "step 2 of stage2 will not run" in caplog.text
    assert not (tmp_path / "stage2").exists()


@pytest.mark.parametrize("given", ["[10, 12]", "10-12", "10 - 12"])
def test_notations_of_a_step_range(repository, given):
    config = load_config(repository / "configs" / "tiny_cpu.yaml", [f"monitoring.profile_steps={given}"])
    assert config.monitoring.profile_steps == (10, 12)


@pytest.mark.parametrize("given", ["0-2", "[3, 2]", "[1, 51]", "7", "[1.5, 2]", "[1, 2, 3]", "a-b", "[true, 2]"])
def test_invalid_step_ranges_are_refused(repository, given):
    with pytest.raises(ConfigError, match=r"monitoring.profile_steps: .* is not a range of steps: write \[10, 12\]"):
        load_config(repository / "configs" / "tiny_cpu.yaml", [f"monitoring.profile_steps={given}"])


def test_profiling_changes_no_result(finished_run, tmp_path):
    """Same metrics and weights from the same data."""
    from collm_dist.tuning.run_stage import run_stage

    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    (run_dir.path / "data").symlink_to(finished_run / "data")
    overrides = [f"run.dir={run_dir.path}", "monitoring.profile_steps=2-3"]
    config = load_config(finished_run / "config.yaml", overrides)
    before = dict(os.environ)
    try:
        summary = run_stage(config, run_dir, "stage1")
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
    recorded = RunDir(finished_run).read_record("stage1")
    for key in ("content_hash", "best_valid", "last_train", "fingerprint"):
        assert summary[key] == recorded[key]
    names = read_trace(run_dir.path / "stage1" / "profile" / "steps-2-3.pt.trace.json.gz")
    assert {"step 2", "step 3"} <= names
    assert any("backward" in str(name).lower() for name in names)
