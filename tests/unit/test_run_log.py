"""The log of a step: damaged lines and files never stop a step."""

import json
import os
import subprocess
import sys

import pytest

from collm_dist.evaluation.plots import plot_training
from collm_dist.monitoring import RunLogger
from collm_dist.monitoring.run_log import read_metrics
from tests.conftest import REPOSITORY

GOOD = [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.4}]


def write_log(path, bad):
    lines = [json.dumps(GOOD[0]).encode(), bad, json.dumps(GOOD[1]).encode(), b'{"step": 3, "tr']
    path.write_bytes(b"\n".join(lines))


def open_logger(folder, start_step):
    options = {"is_main": True, "tensorboard": False, "progress_bar": False, "total_steps": 9}
    return RunLogger(folder, start_step=start_step, **options)


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff\x00\xfe",
        b"[]",
        b"3",
        b"null",
        b'"step"',
        b"{}",
        b'{"step": "a"}',
        b'{"step": null}',
        b"[" * 99_999,
        b"NaN",
    ],
)
def test_a_bad_line_is_left_out(tmp_path, bad):
    write_log(tmp_path / "metrics.jsonl", bad)
    assert read_metrics(tmp_path / "metrics.jsonl") == GOOD
    logger = open_logger(tmp_path, 1)
    logger.log(2, {"train/loss": 0.3})
    logger.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [GOOD[0], {"step": 2, "train/loss": 0.3}]
    assert plot_training({"stage1": tmp_path / "metrics.jsonl"}) is not None


@pytest.mark.parametrize("way", ["directory", "dangling link"])
def test_something_else_in_its_place_is_moved_away(tmp_path, way):
    path = tmp_path / "metrics.jsonl"
    if way == "directory":
        path.mkdir()
        (path / "mine").touch()
        (tmp_path / "metrics.jsonl.damaged").touch()
    else:
        path.symlink_to("nowhere")
    assert read_metrics(path) == []
    plot_training({"stage1": path})
    logger = open_logger(tmp_path, 1)
    logger.log(2, {"train/loss": 0.3})
    logger.close()
    assert read_metrics(path) == [{"step": 2, "train/loss": 0.3}]
    if way == "directory":
        assert (tmp_path / "metrics.jsonl.damaged-1" / "mine").exists()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_of_all_writers_follow_the_umask(tmp_path, mask, mode):
    code = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from collm_dist.runs.atomic_files import sync_files, write_json
folder = Path(sys.argv[1])
write_json(folder / "record.json", {})
save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
sync_files(folder)
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, umask=mask, env=environment)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "record.json": mode,
        "a.safetensors": mode,
    }
