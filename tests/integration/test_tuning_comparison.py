"""Comparisons of tuning steps in separate processes, at small size."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.distributed.conftest import REPOSITORY, prepared_run  # noqa: F401 (a fixture)


def compare(module, run_dir, overrides, output, *arguments):
    """Run a comparison and return its result."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--run-dir", str(run_dir), "--output", str(output)]
    command += ["--config", "configs/tiny_cpu.yaml", "--batches", "2", "--threads", "1", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, "--overrides", *overrides], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((output / f"{module}_cpu.json").read_text()), done.stdout


@pytest.mark.slow
def test_throughput_measures_each_row_count_of_the_peer(prepared_run, tmp_path):  # noqa: F811
    record, output = compare(
        "throughput", *prepared_run, tmp_path, "--phases", "stage2", "--peer-rows", "2", "4", "fastest"
    )
    assert "minutes in all" in output.splitlines()[1]
    phase = record["phases"]["stage2"]
    fastest = min(phase["trial_seconds_by_rows"], key=phase["trial_seconds_by_rows"].get)
    assert {"hf_trainer_2", "hf_trainer_4", f"hf_trainer_{fastest}"} == phase["comparisons"].keys()
    for name, pair in phase["comparisons"].items():
        assert [len(pair["samples"][side]) for side in ("ours", name)] == [2, 2]
        assert pair["speedup_95"][0] <= pair["speedup"] <= pair["speedup_95"][1]
        assert pair["ready"][name]["rows_per_micro_batch"] == int(name.removeprefix("hf_trainer_"))
        assert record["summary"]["stage2"][name]["memory_share"] > 0
    assert {"command", "date", "hardware", "versions", "config"} <= record.keys()
    assert str(tmp_path) not in record["command"]


@pytest.mark.slow
def test_bfloat16_beside_float32(prepared_run, tmp_path):  # noqa: F811
    record, _ = compare("bf16", *prepared_run, tmp_path, "--phases", "stage1", "--any-cpu")
    phase = record["phases"]["stage1"]
    assert phase["samples"].keys() == {"bfloat16", "float32"}
    assert 0 < phase["largest_loss_difference"] < 0.1
