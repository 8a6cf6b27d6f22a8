"""Fixtures of the tuning tests: a run with finished data and CF steps, and helpers that run commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from collm_dist.config.loader import load_config
from collm_dist.runs.run_dir import RunDir

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def prepared_run(tmp_path_factory, tiny_ratings, tiny_backbone_dir):
    """Return (folder, overrides) of a run whose data and CF steps are done."""
    return prepare_run(tmp_path_factory.mktemp("prepared") / "run", tiny_ratings, tiny_backbone_dir)


def prepare_run(folder: Path, inputs: Path, backbone: Path) -> tuple[Path, list[str]]:
    """Run the data and CF steps on ratings.csv and items.csv of a folder; return the run directory and overrides."""
    from collm_dist.orchestration.cluster import connect_ray
    from collm_dist.orchestration.preprocess import run_preprocess
    from collm_dist.orchestration.pretrain import run_pretrain

    overrides = [
        f"dataset.path={inputs / 'ratings.csv'}",
        f"dataset.items_path={inputs / 'items.csv'}",
        f"llm.backbone={backbone}",
    ]
    config = load_config(REPOSITORY / "configs" / "tiny_cpu.yaml", [*overrides, f"run.dir={folder}"])
    with connect_ray(config.cluster):
        run_preprocess(config, RunDir(folder))
        run_pretrain(config, RunDir(folder))
    return folder, overrides


@pytest.fixture
def copy_run(prepared_run, tmp_path):
    """Return a function that copies the prepared run and returns its folder and overrides."""

    def copy(name: str) -> tuple[Path, list[str]]:
        folder, overrides = prepared_run
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name, [*overrides, f"run.dir={tmp_path / name}"]

    return copy


# Arguments of a stage that crosses validations and checkpoints and has random dropout.
STAGE1 = ["--stage", "1", "lora.dropout=0.3", "stage1.max_steps=30", "stage1.eval_every_steps=10"]


@pytest.fixture(scope="session")
def whole(prepared_run, tmp_path_factory):
    """Return the folder of an undisturbed run of STAGE1 on one process."""
    folder, overrides = prepared_run
    copied = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(folder, copied)
    run([sys.executable, "launch/train.py"], [*overrides, f"run.dir={copied}", *STAGE1])
    return copied


PIPELINE = [sys.executable, "launch/run_pipeline.py"]
LONGER = ["lora.dropout=0.3", "stage1.max_steps=30", "stage1.eval_every_steps=10", "stage2.max_steps=30",
          "stage2.eval_every_steps=10", "cluster.restart_backoff_seconds=0.1"]  # fmt: skip


@pytest.fixture(scope="session")
def one_process(prepared_run, tmp_path_factory):
    """Return the run directory of a pipeline of LONGER, tuned by one process without Ray."""
    folder, overrides = prepared_run
    copied = tmp_path_factory.mktemp("one") / "run"
    shutil.copytree(folder, copied)
    run(PIPELINE, [*overrides, f"run.dir={copied}", *LONGER])
    return copied


def read_status(folder: Path) -> dict:
    """Return a run's status."""
    return json.loads((folder / "status.json").read_text())


def assert_same_report(ours: Path, other: Path, tolerance: float = 1e-4) -> None:
    """Compare every model's metrics on every split. Swapping two rows of nearly equal score moves AUC by 1.3e-5."""
    a, b = (json.loads((run / "eval" / "report.json").read_text())["rows"] for run in (ours, other))
    assert len(a) == len(b) > 3
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            if isinstance(value, float):
                assert value == pytest.approx(right[name], abs=tolerance), (left, name)


def start(command: list[str], arguments: list[str], **options) -> subprocess.Popen:
    """Start a command of the launch folder with the tiny configuration."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.Popen(
        [*command, "--config", "configs/tiny_cpu.yaml", *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def run(command: list[str], arguments: list[str]) -> str:
    """Run a command to its end; it must succeed."""
    process = start(command, arguments)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def read_series(folder: Path, stage: str, tag: str) -> list[float]:
    """Return a tag's values in step order."""
    lines = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
    return [line[tag] for line in sorted(lines, key=lambda line: line["step"]) if tag in line]


def wait_for_step(process: subprocess.Popen, folder: Path, stage: str, step: int) -> None:
    """Wait until a running stage has logged a step."""
    log = folder / stage / "metrics.jsonl"
    while not log.exists() or f'"step": {step},' not in log.read_text():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
