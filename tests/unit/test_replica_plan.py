"""Replicas of the service and their devices, on nodes of any size."""

import pytest

from collm_dist.errors import LaunchError
from collm_dist.orchestration.replica_plan import share_devices


@pytest.mark.parametrize(
    ("requested", "cpus", "expected"),
    [(None, [8], (1, 8)), (None, [4, 4, 4], (3, 4)), (1, [8, 8], (1, 8)), (3, [4, 4], (3, 2)),
     (None, [2, 14], (2, 7)), (3, [8, 8], (3, 4)), (None, [0, 6], (1, 6)), (2, [2, 14], (2, 7))],
)  # fmt: skip
def test_replicas_without_gpus_share_the_cpus_of_nodes(requested, cpus, expected):
    nodes = [{"CPU": float(number)} for number in cpus]
    replicas, devices = share_devices(requested, nodes, nodes)
    assert (replicas, devices["num_cpus"]) == expected
    assert devices["num_gpus"] == 0
    assert sum(number // devices["num_cpus"] for number in cpus) >= replicas


def test_a_replica_has_a_gpu_and_a_cpu():
    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 8.0}]
    assert share_devices(None, nodes, nodes) == (3, {"num_cpus": 1, "num_gpus": 1})
    nodes[1] = {"CPU": 0.0, "GPU": 1.0}
    with pytest.raises(LaunchError, match=r"3 models need 1 CPU\(s\) and a GPU each, .* have room for 2; "):
        share_devices(None, nodes, nodes)


@pytest.mark.parametrize(
    ("requested", "free", "room"), [(3, [{"CPU": 2.0}], 2), (1, [{"CPU": 1.0}], 0), (None, [{}], 0)]
)
def test_replicas_without_room_are_refused(requested, free, room):
    """Serve would wait for them."""
    with pytest.raises(LaunchError, match=rf"have room for {room}; start fewer, or free some"):
        share_devices(requested, [{"CPU": 2.0}], free)


def test_free_devices_count_by_node():
    nodes = [{"CPU": 8.0}, {"CPU": 8.0}]
    with pytest.raises(LaunchError, match=r"1 models need 8 CPU\(s\) each, .* have room for 0"):
        share_devices(1, nodes, [{"CPU": 4.0}, {"CPU": 4.0}])
