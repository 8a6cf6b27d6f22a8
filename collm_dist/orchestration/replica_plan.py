"""Number of replicas of the service, and the devices of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray
from ray._private.state import available_resources_per_node

from collm_dist.errors import LaunchError

Resources = Mapping[str, float]


def plan_replicas(requested: int | None) -> tuple[int, dict[str, int]]:
    """Return the number of replicas, and the CPUs and GPUs of each, on the connected cluster.

    Raises:
        LaunchError: too few devices are free.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return share_devices(requested, nodes, list(available_resources_per_node().values()))


def share_devices(
    requested: int | None, nodes: Sequence[Resources], free: Sequence[Resources]
) -> tuple[int, dict[str, int]]:
    """Return the number of replicas, and the CPUs and GPUs of each.

    Args:
        requested: number of replicas; None = one per GPU, or one per node without GPUs.
        nodes: resources of each node.
        free: those of them that nothing uses.

    Raises:
        LaunchError: too few devices are free on the nodes; Serve would wait for them without limit.
    """
    cpus, gpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU"))
    replicas = requested or sum(gpus) or sum(number > 0 for number in cpus)
    # On CPUs the replicas share the cores; Ray gives each as many threads as cores.
    devices = {"num_cpus": 1, "num_gpus": 1} if any(gpus) else {"num_cpus": _share_cpus(replicas, cpus), "num_gpus": 0}
    room = sum(_count_room(node, devices) for node in free)
    if room < replicas:
        needs = f"{devices['num_cpus']} CPU(s)" + " and a GPU" * devices["num_gpus"]
        raise LaunchError(
            f"--replicas: {replicas} models need {needs} each, and the free devices of the cluster's nodes have room "
            f"for {room}; start fewer, or free some"
        )
    return replicas, devices


def _share_cpus(replicas: int, cpus: Sequence[int]) -> int:
    """Return the most CPUs with which so many replicas fit on the nodes, each on one node; 1 if they do not fit."""
    shares = range(max(cpus, default=1), 0, -1)
    return next((share for share in shares if sum(number // share for number in cpus) >= replicas), 1)


def _count_room(free: Resources, devices: Mapping[str, int]) -> int:
    """Return the number of replicas that fit on a node."""
    room = int(free.get("CPU", 0)) // devices["num_cpus"]
    return min(room, int(free.get("GPU", 0))) if devices["num_gpus"] else room
