"""Facts of a Ray node that must agree with those of the node that starts the run."""

from __future__ import annotations

import platform
import socket
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from collm_dist.errors import LaunchError

# Packages that affect results, or how files of other nodes are read.
COMPARED_PACKAGES = ("collm-dist", "torch", "deepspeed", "transformers", "peft", "numpy", "pyarrow")


@dataclass(frozen=True)
class NodeFacts:
    """Facts that a node reports about itself.

    Attributes:
        hostname: its own name.
        sees_file: whether the file that was asked for exists there.
        versions: of Python and of the packages that must be equal on all nodes; ``none`` for a missing package.
    """

    hostname: str
    sees_file: bool
    versions: dict[str, str]


def read_facts(path: str) -> NodeFacts:
    """Return the facts of this node.

    Args:
        path: file that the asking node has written.
    """
    versions = {"Python": platform.python_version()}
    for name in COMPARED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return NodeFacts(socket.gethostname(), Path(path).exists(), versions)


def check_facts(facts: NodeFacts, own: NodeFacts, address: str, folder: Path, name: str) -> None:
    """Check the facts of a node.

    Args:
        facts: of that node.
        own: facts of the asking node.
        address: network address of the node.
        folder: folder that the node must see.
        name: setting or option that chose it.

    Raises:
        LaunchError: the node does not see the folder, or has other versions.
    """
    node = f"node {address} ({facts.hostname})"
    if not facts.sees_file:
        raise LaunchError(
            f"{name}: {node} does not see {folder}; it must be on a file system that all nodes share, at the same path"
        )
    differences = [
        f"{name} {version} (here {own.versions[name]})"
        for name, version in facts.versions.items()
        if version != own.versions[name]
    ]
    if differences:
        raise LaunchError(
            f"{node} has {', '.join(differences)}; install the same versions on all nodes, best from one image"
        )
