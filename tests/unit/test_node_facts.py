"""Comparison of a node's facts with those of the node that starts a run."""

import dataclasses

import pytest

from collm_dist.errors import LaunchError
from collm_dist.orchestration.node_facts import check_facts, read_facts


def test_facts_of_a_node_are_compared(tmp_path):
    own = read_facts(str(tmp_path))
    check_facts(own, own, "10.0.0.2", tmp_path, "--output")
    other = dataclasses.replace(own, hostname="b", versions={**own.versions, "torch": "9.9"})
    with pytest.raises(LaunchError, match=r"node 10\.0\.0\.2 \(b\) has torch 9\.9 \(here "):
        check_facts(other, own, "10.0.0.2", tmp_path, "--output")
    with pytest.raises(LaunchError, match=r"--output: node .* does not see .*a file system that all nodes share"):
        check_facts(dataclasses.replace(own, sees_file=False), own, "10.0.0.2", tmp_path, "--output")
