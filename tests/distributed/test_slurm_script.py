"""The Slurm script without Slurm: its own Ray, the pipeline on it, and the signal before the time limit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from collm_dist.errors import Preempted
from tests.distributed.conftest import LONGER, REPOSITORY, assert_same_report, read_status, wait_for_step
from tests.distributed.test_tuning import assert_same_training


@pytest.fixture
def start_script(tmp_path_factory):
    """Return a function that starts the script with overrides; afterwards no process of it may be left."""
    folder = tmp_path_factory.mktemp("r")  # for Ray's sockets, whose paths must be short
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "RAY_PORT": str(port), "RAY_TMPDIR": str(folder),
        "SLURM_CPUS_PER_TASK": "2", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip

    def begin(overrides: list[str]) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "launch/cluster/slurm.sh", "configs/tiny_cpu.yaml", *overrides],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    yield begin
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(folder) in command]


@pytest.mark.slow
def test_it_stops_on_the_signal_and_resumes(start_script, copy_run, one_process):
    folder, overrides = copy_run("slurm")
    settings = [*overrides, *LONGER, "cluster.num_processes=2", "stage1.checkpoint_every_steps=1000"]
    process = start_script(settings)
    wait_for_step(process, folder, "stage1", 5)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == Preempted.exit_code, output
    assert read_status(folder)["state"] == "interrupted"
    process = start_script(settings)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert_same_training(folder, one_process)
    assert_same_report(folder, one_process)


@pytest.mark.slow
def test_it_forwards_the_pipelines_exit_code(start_script, copy_run):
    _, overrides = copy_run("wrong")
    process = start_script([*overrides, "stage1.learning_rate=-1"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert "stage1.learning_rate" in output
