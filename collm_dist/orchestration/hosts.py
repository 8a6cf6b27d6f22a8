"""Steps on the hosts of a hostfile: what the hosts must have in common, and DeepSpeed's launcher on all of them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from collm_dist.cli import CONTROL_FILE_VARIABLE, ERROR_FILE_VARIABLE
from collm_dist.errors import ConfigError, LaunchError
from collm_dist.orchestration.node_facts import NodeFacts, check_facts, read_facts
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.runs.lock import TOKEN_VARIABLE
from collm_dist.runs.step_processes import find_free_port, run_child

# The first import of torch from a shared file system takes its minutes.
SSH_SECONDS, FACTS_SECONDS = 30, 600
# A host that is switched off closes no connection: without this, pdsh would wait for it for ever.
_KEEP_ALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
# pdsh hands its words to the shells of the hosts as they are.
_PLAIN_WORD = re.compile(r"[\w@+=:,./-]+")
_HOST_LINE = re.compile(r"([A-Za-z0-9][\w.@-]*)\s+slots=([1-9]\d*)\s*(?:#.*)?")
# What of this environment the processes need besides; anything else belongs into .deepspeed_env. Command lines are seen
# by everybody, so nothing secret may be among them.
_CARRIED = re.compile(r"OMP_NUM_THREADS|HF_HOME|HF_HUB_OFFLINE|TOKENIZERS_PARALLELISM|(?:NCCL|GLOO)_\w+")


@dataclass(frozen=True)
class Host:
    """A line of a hostfile: a name that ssh knows, and how many processes it gets."""

    name: str
    slots: int


def load_hostfile(path: Path) -> list[Host]:
    """Return the hosts of a hostfile: lines of ``name slots=number``, comments after ``#``.

    Raises:
        ConfigError: it cannot be read or is not of that form; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cluster.hostfile: '{path}' cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _HOST_LINE.fullmatch(text)
        if match is None:
            raise ConfigError(f"cluster.hostfile: {path}, line {number}: '{text}' is not of the form 'name slots=4'")
        if match[1] in hosts:
            raise ConfigError(f"cluster.hostfile: {path}, line {number}: host '{match[1]}' is there twice; give it "
                              "once, with all its slots")  # fmt: skip
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise ConfigError(f"cluster.hostfile: {path} names no host; write a line 'name slots=4' for each")
    return list(hosts.values())


def run_on_hosts(
    hostfile: Path, master_address: str | None, run_dir: Path, script: Path, arguments: Sequence[str]
) -> None:
    """Run a script as one process to each slot of a hostfile's hosts, through ``deepspeed --hostfile``.

    A stop that is asked for here reaches the processes through a file in the run directory, since no signal crosses
    ssh: they save a checkpoint at the next step, all together. What outlives the command ends for want of that file.

    Args:
        hostfile: see ``load_hostfile``.
        master_address: of the first host, for the others; None for the first that it names itself.
        run_dir: on a file system that all hosts share.
        script: Python file that calls ``run_command``, at the same path on all hosts.
        arguments: of the script.

    Raises:
        ConfigError: the hostfile is wrong, or a path has characters that a shell would read as something else.
        LaunchError: pdsh is not installed; a host cannot be reached, has other versions, too few devices, or does not
            see the run directory.
        CollmError: see ``run_child``.
    """
    hosts = load_hostfile(hostfile)
    top = run_dir.absolute() / ".workers"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile.absolute())]
    # A single host is another one, too; and what DeepSpeed would check of ssh has been checked, of all hosts.
    command += ["--force_multi", "--no_ssh_check", "--launcher", "pdsh", "--master_port", str(find_free_port())]
    command += ["--master_addr", master_address] if master_address else []
    command += [str(script), *arguments]
    _check_plain([*command, str(Path.cwd()), str(top)])
    if shutil.which("pdsh") is None:
        raise LaunchError("cluster.hostfile: DeepSpeed's launcher reaches hosts through pdsh, which is not installed "
                          "here; install it (Debian: apt-get install pdsh), or set cluster.tuning to ray")  # fmt: skip
    shutil.rmtree(top, ignore_errors=True)  # what an earlier command has left running ends by that
    top.mkdir(parents=True)
    folder = Path(tempfile.mkdtemp(dir=top))
    try:
        carried = _carry_environment(hosts, check_hosts(hosts, folder))
        carried |= {ERROR_FILE_VARIABLE: str(folder / "error.json"), CONTROL_FILE_VARIABLE: str(folder / "control")}
        _write_environment(folder / "environment", carried)
        options = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {_KEEP_ALIVE}".strip()
        own = {"DS_ENV_FILE": str(folder / "environment"), "PDSH_SSH_ARGS_APPEND": options}
        run_child(command, {**os.environ, **own}, shared=folder)
    finally:
        shutil.rmtree(top, ignore_errors=True)


def _check_plain(words: Sequence[str]) -> None:
    for word in words:
        if not _PLAIN_WORD.fullmatch(word):
            raise ConfigError(
                f"cluster.hostfile: '{word}' goes through shells on other hosts; use paths and names of letters, "
                "digits and _ @ + = : , . / - alone"
            )


def check_hosts(hosts: Sequence[Host], folder: Path) -> list[NodeFacts]:
    """Ask all hosts at once, through ssh, for what they must have in common with this one.

    Args:
        hosts: of a hostfile.
        folder: that they must see.

    Returns:
        The facts of each.

    Raises:
        LaunchError: see ``run_on_hosts``; the first such host in the order of the file is named.
    """
    sentinel = folder / ".sentinel"
    with open_atomic(sentinel) as file:
        file.write("collm-dist\n")
    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = [pool.submit(_ask, host, sentinel) for host in hosts]
        own, facts = read_facts(str(sentinel)), []
        for host, answer in zip(hosts, answers, strict=True):
            check_facts(answer.result(), own, host.name, folder)
            facts.append(answer.result())
    sentinel.unlink()
    for host, one in zip(hosts, facts, strict=True):
        if any(other.num_gpus for other in facts) and one.num_gpus < host.slots:
            raise LaunchError(
                f"cluster.hostfile: node {host.name} ({one.hostname}) has {one.num_gpus} GPUs for {host.slots} slots; "
                "give it fewer, or leave it out"
            )
    return facts


def _ask(host: Host, sentinel: Path) -> NodeFacts:
    search = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    remote = ["env", f"--chdir={Path.cwd()}", f"PYTHONPATH={search}", sys.executable, "-m", read_facts.__module__]
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}", host.name]
    try:
        done = subprocess.run(  # noqa: S603 - a host's name starts with a letter or digit, the rest is quoted
            [*command, shlex.join([*remote, str(sentinel)])],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FACTS_SECONDS,
        )
    except FileNotFoundError:
        raise LaunchError("cluster.hostfile: there is no ssh here; install its client") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"cluster.hostfile: node {host.name} has not answered within {FACTS_SECONDS} s") from None
    if done.returncode == 0:
        with suppress(ValueError, TypeError, IndexError):
            return NodeFacts(**json.loads(done.stdout.splitlines()[-1]))
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, answer '{done.stdout[-80:]}'"])[-1]
    if done.returncode == 255:
        raise LaunchError(f"cluster.hostfile: node {host.name} cannot be reached by ssh without a password: {said}; "
                          f"try: ssh -o BatchMode=yes {host.name} hostname")  # fmt: skip
    raise LaunchError(f"cluster.hostfile: node {host.name} cannot run collm-dist: {said}; it needs the same "
                      f"environment ({sys.executable}) and folder ({Path.cwd()}) at the same paths")  # fmt: skip


def _carry_environment(hosts: Sequence[Host], facts: Sequence[NodeFacts]) -> dict[str, str]:
    """Return what the processes shall find in their environment: the run's lock, threads, a few settings of here."""
    carried = {name: value for name, value in os.environ.items() if _CARRIED.fullmatch(name)}
    if not any(one.num_gpus for one in facts):
        carried["DS_ACCELERATOR"] = "cpu"
        threads = min(one.num_cpus // host.slots for host, one in zip(hosts, facts, strict=True))
        carried.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    return carried | {TOKEN_VARIABLE: os.environ[TOKEN_VARIABLE]}


def _write_environment(path: Path, carried: Mapping[str, str]) -> None:
    """Write a file that DeepSpeed reads in place of the user's ``.deepspeed_env``, whose lines come first."""
    own = [place / ".deepspeed_env" for place in (Path.home(), Path.cwd())]
    lines = [line for file in own if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()]
    lines += [f"{name}={value}" for name, value in carried.items()]
    with open_atomic(path) as file:
        file.write("".join(f"{line}\n" for line in lines if "=" in line))
