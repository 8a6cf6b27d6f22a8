"""A guard metric in real training: it restricts the choice, and a killed stage remembers where it started."""

from __future__ import annotations

import json
import signal
import sys
import time

import numpy as np
import pytest

from collm_dist import monitoring
from tests.distributed.conftest import read_series, run, start

PYTHON = [sys.executable, "launch/train.py"]
# A learning rate at which all metrics jump.
SETTINGS = ["--stage", "1", "stage1.max_steps=12", "stage1.eval_every_steps=1", "stage1.learning_rate=0.3",
            "stage1.early_stop_patience=20", "stage1.guard_metric=uauc"]  # fmt: skip


def read_summary(folder):
    return json.loads((folder / "stage1" / "summary.json").read_text())


@pytest.mark.slow
def test_a_guard_restricts_the_choice_also_after_a_kill(copy_run):
    whole, overrides = copy_run("whole")
    run(PYTHON, [*overrides, *SETTINGS])
    auc, uauc = (np.array(read_series(whole, "stage1", tag)) for tag in (monitoring.VALID_AUC, monitoring.VALID_UAUC))
    assert len(auc) == 13  # the untrained model is validated too
    allowed = uauc >= uauc[0] - 0.005
    summary = read_summary(whole)
    assert 0 < summary["guard_refusals"] == np.sum(~allowed)
    assert summary["best_valid"]["step"] == np.argmax(np.where(allowed, auc, -1))
    assert np.argmax(auc) != summary["best_valid"]["step"], "the guard must change the choice"

    killed, overrides = copy_run("killed")
    process = start(PYTHON, [*overrides, *SETTINGS])
    log = killed / "stage1" / "metrics.jsonl"
    while not log.exists() or '"step": 5' not in log.read_text():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run(PYTHON, [*overrides, *SETTINGS])
    for key in ("best_valid", "guard_refusals", "global_steps"):
        assert read_summary(killed)[key] == summary[key]
    name = "stage1/adapter/adapter_model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
