"""Hostfiles, and what is asked of nodes before work starts. The real thing: tests/distributed/test_hostfile.py."""

import dataclasses
from pathlib import Path

import pytest

from collm_dist.config import ClusterConfig
from collm_dist.config.loader import load_config
from collm_dist.errors import ConfigError, LaunchError
from collm_dist.orchestration.hosts import Host, load_hostfile, run_on_hosts
from collm_dist.orchestration.node_facts import check_facts, read_facts
from collm_dist.orchestration.pipeline import describe_plan, run_pipeline
from collm_dist.runs.run_dir import RunDir


def test_a_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two boxes\n\nworker-0 slots=8\n  me@10.0.0.2\tslots=4  # half of it\n")
    assert load_hostfile(path) == [Host("worker-0", 8), Host("me@10.0.0.2", 4)]


def test_the_example_is_one():
    example = Path(__file__).parents[2] / "launch" / "cluster" / "hostfile.example"
    assert [host.slots for host in load_hostfile(example)] == [8, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=1\nb\n", "line 2: 'b' is not of the form"),
        ("a slots=0\n", "line 1: 'a slots=0' is not"),
        ("a slots=1 b slots=2\n", "line 1"),
        ("-oProxyCommand=touch slots=1\n", "line 1"),
        ("$(reboot) slots=1\n", "line 1"),
        ("a slots=1\nb slots=1\na slots=2\n", "line 3: host 'a' is there twice"),
        ("# nobody\n", "names no host"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_hostfile(tmp_path, text, message):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        load_hostfile(path)


@pytest.mark.parametrize("name", ["two words", "a;b", "$HOME", "a'b", "%h", "a\nb", "(x)"])
def test_what_a_shell_would_read_as_something_else_never_gets_there(tmp_path, name):
    path = tmp_path / "hosts"
    path.write_text("localhost slots=1\n")
    with pytest.raises(ConfigError, match="goes through shells on other hosts"):
        run_on_hosts(path, None, tmp_path / name, Path("train.py"), [])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "settings",
    [
        {"hostfile": "h", "tuning": "ray"},
        {"hostfile": "h", "num_processes": 2},
        {"master_address": "10.0.0.1"},
        {"hostfile": "h", "master_address": "a b"},
    ],
)
def test_settings_that_contradict_each_other(settings):
    with pytest.raises(ValueError, match=r"hostfile|master_address"):
        ClusterConfig(**settings)


def test_facts_of_a_node_are_compared(tmp_path):
    own = read_facts(str(tmp_path))
    check_facts(own, own, "10.0.0.2", tmp_path)
    other = dataclasses.replace(own, hostname="b", versions={**own.versions, "torch": "9.9"})
    with pytest.raises(LaunchError, match=r"node 10\.0\.0\.2 \(b\) has torch 9\.9 \(here "):
        check_facts(other, own, "10.0.0.2", tmp_path)
    with pytest.raises(LaunchError, match=r"does not see .*a file system that all nodes share"):
        check_facts(dataclasses.replace(own, sees_file=False), own, "10.0.0.2", tmp_path)


def test_a_hostfile_that_is_wrong_stops_the_pipeline_before_it_begins(tmp_path):
    root = Path(__file__).parents[2]
    settings = [f"run.dir={tmp_path / 'run'}", f"cluster.hostfile={tmp_path / 'none'}"]
    config = load_config(root / "configs" / "tiny_cpu.yaml", settings)
    with pytest.raises(ConfigError, match=r"cluster\.hostfile: .* cannot be read"):
        describe_plan(config, RunDir(Path(config.run.dir)))
    assert run_pipeline(config, root / "launch") == ConfigError.exit_code
    assert not (tmp_path / "run" / "data").exists()
