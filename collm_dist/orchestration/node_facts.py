"""What a node must have in common with the one that a command runs on, asked through Ray or through ssh.

``python -m collm_dist.orchestration.node_facts FILE`` prints it as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from collm_dist.errors import LaunchError

# Those that take part in what is computed, or in reading what other nodes have written.
COMPARED_PACKAGES = ("collm-dist", "torch", "deepspeed", "transformers", "peft", "numpy", "pyarrow")


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself.

    Attributes:
        hostname: its own name.
        sees_file: whether it sees the file that it was asked for.
        versions: of Python and of what must be equal on all nodes; ``none`` where a package is not installed.
        num_cpus: cores.
        num_gpus: as torch counts them; 0 where nobody asked.
    """

    hostname: str
    sees_file: bool
    versions: dict[str, str]
    num_cpus: int
    num_gpus: int = 0


def read_facts(path: str, *, with_devices: bool = False) -> NodeFacts:
    """Return the facts of this node.

    Args:
        path: a file that the asking node has written.
        with_devices: whether to count GPUs, for which torch has to be imported.
    """
    versions = {"Python": platform.python_version()}
    for name in COMPARED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    num_gpus = 0
    if with_devices:
        import torch

        num_gpus = torch.cuda.device_count()
    return NodeFacts(socket.gethostname(), Path(path).exists(), versions, os.cpu_count() or 1, num_gpus)


def check_facts(facts: NodeFacts, own: NodeFacts, address: str, folder: Path) -> None:
    """Check what one node has said.

    Args:
        facts: of that node.
        own: of the node that asks.
        address: by which it was asked.
        folder: that it should see.

    Raises:
        LaunchError: it does not see the folder, or has other versions.
    """
    node = f"node {address} ({facts.hostname})"
    if not facts.sees_file:
        raise LaunchError(
            f"run.dir: {node} does not see {folder}; the run directory must be on a file system that all nodes share, "
            "at the same path"
        )
    others = [f"{name} {there} (here {own.versions[name]})" for name, there in facts.versions.items()
              if there != own.versions[name]]  # fmt: skip
    if others:
        raise LaunchError(
            f"{node} has {', '.join(others)}; install the same versions on all nodes, best from one image"
        )


if __name__ == "__main__":
    print(json.dumps(asdict(read_facts(sys.argv[1], with_devices=True))))
