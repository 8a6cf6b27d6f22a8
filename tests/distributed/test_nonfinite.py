"""A row with a NaN loss: no rank updates, and the message names the row."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest

from collm_dist.config.loader import load_config
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.run_stage import build_orders
from tests.distributed.conftest import REPOSITORY, run, start
from tests.distributed.test_tuning import assert_same_training

SCRIPT = "tests/distributed/broken_train.py"
ONE, TWO = [sys.executable, SCRIPT], ["torchrun", "--nproc_per_node", "2", SCRIPT]
SETTINGS = ["--stage", "1", "lora.dropout=0.3", "stage1.max_steps=6", "stage1.max_tokens_per_micro_batch=500"]
BAD_STEP = 2


@pytest.fixture
def poisoned_row(prepared_run, monkeypatch):
    """Return a row whose score is NaN in all processes that the test starts."""
    folder, overrides = prepared_run
    config = load_config(REPOSITORY / "configs" / "tiny_cpu.yaml", [*overrides, f"run.dir={folder}"])
    order, _ = build_orders(config, RunDir(folder), config.stage1)
    batches = list(order.iter_batches())
    row = int(batches[BAD_STEP].row_id[5])
    monkeypatch.setenv("FAULT", f"nan:{row}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return row


def assert_named(output, row):
    match = re.search(rf"step {BAD_STEP}: .* not finite, on process (\d) in the micro-batch of rows ([\d, ]+);", output)
    assert match, output
    rows = [int(number) for number in match[2].split(",")]
    assert row in rows
    assert len(rows) < 16  # the rows of a micro-batch, not of the step


@pytest.mark.slow
def test_stops_before_the_update(copy_run, poisoned_row):
    folder, overrides = copy_run("run")
    process = start(TWO, [*overrides, *SETTINGS])
    output, _ = process.communicate()
    assert process.returncode != 0  # the launcher's exit code; the rank's is in the message below
    assert "exitcode  : 4" in output
    assert_named(output, poisoned_row)
    assert output.count("NonFiniteError") == 1
    assert 'Traceback (most recent call last):\n  File "launch' not in output
    # The last good state was saved; skipping the step, the run resumes from it.
    assert list((folder / "stage1" / "checkpoints").glob("step-*"))
    output = run(TWO, [*overrides, *SETTINGS, "stage1.on_nonfinite=skip"])
    assert "Skipped (1 of at most 10)" in output
    assert json.loads((folder / "stage1" / "summary.json").read_text())["nonfinite_skips"] == 1


@pytest.mark.parametrize("zero_stage", [pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3)])
def test_skips_alike_on_any_number_of_processes(copy_run, poisoned_row, zero_stage):
    skip = [*SETTINGS, "stage1.on_nonfinite=skip"]
    one, overrides = copy_run("one")
    run(ONE, [*overrides, *skip])
    two, overrides = copy_run("two")
    output = run(TWO, [*overrides, *skip, f"cluster.zero_stage={zero_stage}"])
    assert_named(output, poisoned_row)
    assert_same_training(two, one, stages=("stage1",))
    for folder in (one, two):
        assert json.loads((folder / "stage1" / "summary.json").read_text())["nonfinite_skips"] == 1


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_skips_in_bfloat16(copy_run, poisoned_row, zero_stage):
    """In bfloat16 DeepSpeed keeps float32 weights and would check gradients separately."""
    folder, overrides = copy_run("run")
    settings = [*SETTINGS, "stage1.on_nonfinite=skip", "llm.dtype=bfloat16", f"cluster.zero_stage={zero_stage}"]
    output = run(ONE, [*overrides, *settings])
    assert_named(output, poisoned_row)
    summary = json.loads((folder / "stage1" / "summary.json").read_text())
    assert (summary["global_steps"], summary["nonfinite_skips"]) == (6, 1)
    assert math.isfinite(summary["best_valid"]["logloss"])


def test_skips_no_more_than_allowed(copy_run, poisoned_row):
    _, overrides = copy_run("run")
    process = start(ONE, [*overrides, *SETTINGS, "stage1.on_nonfinite=skip", "stage1.max_nonfinite_skips=0"])
    output, _ = process.communicate()
    assert process.returncode == 4, output
    assert "max_nonfinite_skips=0 steps were skipped before" in output
