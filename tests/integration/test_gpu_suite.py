"""The GPU suite at small size on a CPU, without Ray, which GPU machines may lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.conftest import REPOSITORY, prepared_run  # noqa: F401 (a fixture)

NO_RAY = "import sys\nsys.modules['ray'] = None\n"


def run_suite(output, run_dir, overrides, *arguments, folder):
    """Run the suite with an interpreter that cannot import Ray, like the processes that it starts."""
    (folder / "sitecustomize.py").write_text(NO_RAY)
    backbone = next(setting.partition("=")[2] for setting in overrides if setting.startswith("llm.backbone="))
    settings = [setting for setting in overrides if not setting.startswith("llm.backbone=")]
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--run-dir", str(run_dir), "--output", str(output)]
    command += ["--backbone", f"tiny={backbone}", "--config", "configs/tiny_cpu.yaml", "--batches", "2", "--shapes"]
    command += [*arguments, "--overrides", *settings]
    path = os.pathsep.join([str(folder), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.mark.slow
def test_every_piece_runs_without_ray(prepared_run, tmp_path):  # noqa: F811
    run_dir, overrides = prepared_run
    pieces = ["--pieces", "tests", "throughput", "zero", "growth", "full", "--shapes", "7m"]
    done = run_suite(tmp_path / "out", run_dir, overrides, *pieces, folder=tmp_path)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    tests = index["tasks"].pop("tests")
    assert tests["status"] in ("done", "failed with code 5")  # without a GPU there is nothing to run
    logs = {name: (tmp_path / "out" / f"{name}.log").read_text()[-2000:] for name in index["tasks"]}
    assert {task["status"] for task in index["tasks"].values()} == {"done"}, (done.stdout, logs)
    results = {path.name for path in Path(tmp_path / "out").glob("*.json")}
    assert {
        "throughput_cpu_tiny.json",
        "tuning_growth_cpu.json",
        "zero3_stage2_summary.json",
        "full_eval_report.json",
    } <= results


def test_commands_are_printed(tmp_path):
    overrides = ["llm.backbone=somewhere", "cluster.zero_stage=1"]
    done = run_suite(tmp_path / "out", tmp_path, overrides, "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    programs = [
        next(word for word in line.split() if word.startswith(("pytest", "benchmarks.", "launch/"))) for line in lines
    ]
    throughput, train = "benchmarks.throughput", "launch/train.py"
    expected = ["pytest", throughput, throughput, throughput]  # plain, compiled, with eager attention
    expected += [
        "benchmarks.attention_steps",
        train,
        train,
        train,
        "benchmarks.tuning_growth",
        train,
        "launch/evaluate_model.py",
    ]
    assert programs == expected
    assert all("cluster.zero_stage=1" in line for line in lines if "pytest" not in line)
