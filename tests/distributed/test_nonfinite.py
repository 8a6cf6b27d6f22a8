"""A row whose loss is no number: nothing is updated with it, on any process, and it is named."""

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
    """A row of one step, which the processes that a test starts find poisoned."""
    folder, overrides = prepared_run
    config = load_config(REPOSITORY / "configs" / "tiny_cpu.yaml", [*overrides, f"run.dir={folder}"])
    order, _ = build_orders(config, RunDir(folder), config.stage1)
    batches = list(order.iter_batches())
    row = int(batches[BAD_STEP].row_id[5])
    monkeypatch.setenv("FAULT", f"nan:{row}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return row


def assert_named(output, row):
    found = re.search(rf"step {BAD_STEP}: .* not finite, on process (\d) in the micro-batch of rows ([\d, ]+);", output)
    assert found, output
    rows = [int(one) for one in found[2].split(",")]
    assert row in rows
    assert len(rows) < 16  # a micro-batch's, not the step's


def test_stops_before_the_update(copy_run, poisoned_row):
    folder, overrides = copy_run("run")
    process = start(TWO, [*overrides, *SETTINGS])
    output, _ = process.communicate()
    assert process.returncode != 0  # the launcher's own code; ours is in the message below
    assert "exitcode  : 4" in output
    assert_named(output, poisoned_row)
    assert output.count("NonFiniteError") == 1
    assert 'Traceback (most recent call last):\n  File "launch' not in output
    # What was whole is there; leaving the step out, the run goes on from it.
    assert list((folder / "stage1" / "checkpoints").glob("step-*"))
    output = run(TWO, [*overrides, *SETTINGS, "stage1.on_nonfinite=skip"])
    assert "Left out (1 of at most 10)" in output
    assert json.loads((folder / "stage1" / "summary.json").read_text())["nonfinite_skips"] == 1


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_left_out_alike_on_any_processes(copy_run, poisoned_row, zero_stage):
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
def test_left_out_in_bfloat16(copy_run, poisoned_row, zero_stage):
    """Where DeepSpeed keeps the weights in float32 and would look at gradients one by one."""
    folder, overrides = copy_run("run")
    settings = [*SETTINGS, "stage1.on_nonfinite=skip", "llm.dtype=bfloat16", f"cluster.zero_stage={zero_stage}"]
    output = run(ONE, [*overrides, *settings])
    assert_named(output, poisoned_row)
    summary = json.loads((folder / "stage1" / "summary.json").read_text())
    assert (summary["global_steps"], summary["nonfinite_skips"]) == (6, 1)
    assert math.isfinite(summary["best_valid"]["logloss"])


def test_not_more_than_the_bound(copy_run, poisoned_row):
    _, overrides = copy_run("run")
    process = start(ONE, [*overrides, *SETTINGS, "stage1.on_nonfinite=skip", "stage1.max_nonfinite_skips=0"])
    output, _ = process.communicate()
    assert process.returncode == 4, output
    assert "max_nonfinite_skips=0 were left out before" in output
