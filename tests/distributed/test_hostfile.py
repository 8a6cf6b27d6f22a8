"""``deepspeed --hostfile``: two hosts of one machine, reached through a real sshd on its loopback, and pdsh.

The signal that ends DeepSpeed's launcher makes it kill all launches of this user and environment on its hosts, also
those of others who test here: nothing below sends it one.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from collm_dist.errors import LaunchError, Preempted
from collm_dist.orchestration.hosts import Host, check_hosts
from tests.distributed.conftest import (
    LONGER,
    PIPELINE,
    assert_same_report,
    read_status,
    run,
    start,
    wait_for_step,
)
from tests.distributed.test_tuning import assert_same_training

pytestmark = pytest.mark.slow
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    """A server for this user's own key alone, and an ``ssh`` with that key as the first one of PATH."""
    missing = [name for name in ("ssh", "ssh-keygen", "pdsh") if shutil.which(name) is None]
    if missing or SSHD is None:
        pytest.skip(f"needs {', '.join([*missing, *([] if SSHD else ['sshd'])])} (openssh-server, pdsh)")
    folder = tmp_path_factory.mktemp("ssh")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    server = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host_key", "PidFile": folder / "pid",
        "AuthorizedKeysFile": folder / "key.pub", "PasswordAuthentication": "no", "KbdInteractiveAuthentication": "no",
        "UsePAM": "no", "StrictModes": "no", "PermitRootLogin": "prohibit-password", "AllowUsers": getpass.getuser(),
    }  # fmt: skip
    client = {
        "Port": port, "IdentityFile": folder / "key", "IdentitiesOnly": "yes", "BatchMode": "yes",
        "UserKnownHostsFile": folder / "known", "StrictHostKeyChecking": "accept-new", "LogLevel": "ERROR",
    }  # fmt: skip
    closed = "Host closed\nHostName 127.0.0.1\nPort 1\nHost *\n"
    for name, first, settings in (("sshd_config", "", server), ("ssh_config", closed, client)):
        (folder / name).write_text(first + "".join(f"{key} {value}\n" for key, value in settings.items()))
    # As a user's own ~/.ssh/config would do it, which is none of a test's business.
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    if os.geteuid() == 0:  # where sshd puts what has no privileges; a service would have made it
        Path("/run/sshd").mkdir(exist_ok=True)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder / 'bin'}:{before}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        for host in ("127.0.0.1", "localhost"):
            _wait_for(host, folder / "log")
        yield
    finally:
        process.terminate()
        process.wait()
        os.environ["PATH"] = before


def _wait_for(host: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while subprocess.run(["ssh", host, "true"], capture_output=True).returncode != 0:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.fixture
def hostfile(ssh, tmp_path):
    """A file of two names of this machine."""
    path = tmp_path / "hosts.txt"
    path.write_text("# one process each\n127.0.0.1 slots=1\nlocalhost slots=1\n")
    return path


@pytest.fixture
def on_hosts(hostfile):
    """Overrides of a pipeline whose tuning runs there."""
    return [f"cluster.hostfile={hostfile}", "cluster.master_address=127.0.0.1"]


def find_worker(folder: Path, rank: int) -> psutil.Process:
    """The training process of that number."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if any("train.py" in one for one in words) and f"{folder}/config.yaml" in words and "-u" in words:
                environment = process.environ()
                if environment.get("RANK") == str(rank) and "deepspeed.launcher" not in " ".join(words):
                    return process
    raise AssertionError(f"there is no process of rank {rank}")


def test_the_launcher_itself(copy_run, one_process, hostfile, tmp_path, monkeypatch):
    """As a person types it; what the processes need in their environment stands in DeepSpeed's own file."""
    (tmp_path / "environment").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "environment"))
    folder, overrides = copy_run("typed")
    launcher = ["deepspeed", "--hostfile", str(hostfile), "--master_addr", "127.0.0.1"]
    settings = [*overrides, *LONGER]
    output = run([*launcher, "launch/train.py"], settings)
    assert "localhost: " in output
    assert "127.0.0.1: " in output
    run([*launcher, "launch/evaluate_model.py"], settings)
    assert json.loads((folder / "stage2" / "summary.json").read_text())["world_size"] == 2
    assert_same_training(folder, one_process)
    assert_same_report(folder, one_process)


def test_the_pipeline_on_hosts_one_of_whose_processes_is_lost(copy_run, one_process, on_hosts):
    folder, overrides = copy_run("hosts")
    process = start(PIPELINE, [*overrides, *LONGER, *on_hosts])
    wait_for_step(process, folder, "stage1", 5)
    find_worker(folder, 1).kill()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    status = read_status(folder)
    assert (status["state"], status["restarts"]) == ("done", 1)
    assert json.loads((folder / "stage2" / "summary.json").read_text())["world_size"] == 2
    assert_same_training(folder, one_process)
    assert_same_report(folder, one_process)
    assert not (folder / ".workers").exists()


def test_a_stop_reaches_the_processes_on_the_hosts(copy_run, one_process, on_hosts):
    folder, overrides = copy_run("asked")
    rare = ["stage1.checkpoint_every_steps=1000"]
    process = start(PIPELINE, [*overrides, *LONGER, *on_hosts, *rare])
    wait_for_step(process, folder, "stage1", 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == Preempted.exit_code, output
    assert read_status(folder)["state"] == "interrupted"
    assert any((folder / "stage1" / "checkpoints").iterdir())
    run(PIPELINE, [*overrides, *LONGER, *on_hosts, *rare])
    assert_same_training(folder, one_process)


def test_processes_end_whose_command_is_gone(copy_run, on_hosts):
    """As after the loss of the machine that the command ran on: nobody is left to pass on a signal."""
    folder, overrides = copy_run("gone")
    process = start(PIPELINE, [*overrides, *LONGER, *on_hosts, "stage1.max_steps=100000"])
    wait_for_step(process, folder, "stage1", 5)
    workers = [find_worker(folder, rank) for rank in (0, 1)]
    process.kill()
    shutil.rmtree(folder / ".workers")  # the first thing that the next command does
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    process.communicate(timeout=60)


def test_a_host_that_cannot_be_reached_or_has_no_environment(ssh, tmp_path, monkeypatch):
    with pytest.raises(LaunchError, match="node closed cannot be reached by ssh without a password"):
        check_hosts([Host("localhost", 1), Host("closed", 1)], tmp_path)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(LaunchError, match=r"node localhost cannot run collm-dist: .*No such file"):
        check_hosts([Host("localhost", 1)], tmp_path)
