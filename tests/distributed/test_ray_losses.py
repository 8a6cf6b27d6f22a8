"""Lost workers and nodes of a Ray cluster during the data step and CF training: the results stay the same.

Nodes are processes of one machine (``ray.cluster_utils.Cluster``), each with its own scheduler and workers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import psutil
import pytest
from ray.cluster_utils import Cluster

from benchmarks.lib.synthetic_logs import write_synthetic_logs
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow
ROWS = 400_000


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Return the folder of a log that takes about ten seconds, its overrides, and its undisturbed data record."""
    folder = tmp_path_factory.mktemp("logs")
    written = write_synthetic_logs(folder, ROWS)
    overrides = [f"dataset.path={written.interactions}", f"dataset.items_path={written.items}",
                 "preprocessing.num_user_buckets=32", "preprocessing.ties=order"]  # fmt: skip
    run("preprocess_data", [*overrides, f"run.dir={folder / 'quiet'}"])
    return folder, overrides, json.loads((folder / "quiet" / "data" / "manifest.json").read_text())


@pytest.fixture
def cluster():
    """Return a Ray cluster, whose head has no CPUs, and its two nodes of one CPU each."""
    ray_cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [ray_cluster.add_node(num_cpus=1) for _ in range(2)]
    ray_cluster.wait_for_nodes()
    yield ray_cluster, nodes
    ray_cluster.shutdown()


def start(script, overrides):
    command = [sys.executable, f"launch/{script}.py", "--config", "configs/tiny_cpu.yaml", *overrides]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(script, overrides):
    process = start(script, overrides)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output


def list_busy():
    """Return the processes that run a task, on all nodes. Agents have similar names; a node dies with its agents."""
    names = {process: "".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])}
    return [
        process
        for process, name in names.items()
        if name.startswith("ray::") and not ("IDLE" in name or "Agent" in name)
    ]


def finish(process, folder):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return json.loads((folder / "data" / "manifest.json").read_text())


def wait_for(condition, process):
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_workers_in_the_data_step(cluster, logs, tmp_path):
    """Every second, one busy worker is killed."""
    ray_cluster, _ = cluster
    _, overrides, quiet = logs
    process = start(
        "preprocess_data", [*overrides, f"cluster.ray_address={ray_cluster.address}", f"run.dir={tmp_path}"]
    )
    killed = []

    def kill():
        while process.poll() is None and len(killed) < 4:
            time.sleep(1)
            for worker in list_busy()[:1]:
                worker.kill()
                killed.append(worker.pid)

    killer = threading.Thread(target=kill, daemon=True)
    wait_for(lambda: (tmp_path / "data").exists(), process)
    killer.start()
    record = finish(process, tmp_path)
    assert killed
    assert (record["content_hash"], record["shards"]) == (quiet["content_hash"], quiet["shards"])


def test_a_lost_node_in_the_data_step(cluster, logs, tmp_path):
    ray_cluster, nodes = cluster
    _, overrides, quiet = logs
    process = start(
        "preprocess_data", [*overrides, f"cluster.ray_address={ray_cluster.address}", f"run.dir={tmp_path}"]
    )
    wait_for(lambda: any(path.is_file() for path in (tmp_path / "data").rglob("*")), process)
    time.sleep(1)
    ray_cluster.remove_node(nodes[0], allow_graceful=False)
    assert process.poll() is None
    record = finish(process, tmp_path)
    assert (record["content_hash"], record["shards"]) == (quiet["content_hash"], quiet["shards"])


def test_a_lost_node_in_cf_training(cluster, logs, tmp_path):
    """Two workers on two nodes: one node is lost, a new one joins, training resumes from its checkpoint."""
    ray_cluster, nodes = cluster
    folder, overrides, _ = logs
    settings = [*overrides, "cf.num_workers=2", "cf.num_epochs=14", "cf.early_stop_patience=14",
                "cf.checkpoint_every_epochs=2", f"cluster.ray_address={ray_cluster.address}"]  # fmt: skip
    summaries = []
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(folder / "quiet" / "data", target_is_directory=True)
        process = start("pretrain_cf", [*settings, f"run.dir={tmp_path / name}"])
        if name == "disturbed":
            log = tmp_path / name / "cf" / "metrics.jsonl"
            wait_for(lambda log=log: log.exists() and '"step": 5' in log.read_text(), process)
            ray_cluster.remove_node(nodes[0], allow_graceful=False)
            ray_cluster.add_node(num_cpus=1)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
        summaries.append(json.loads((tmp_path / name / "cf" / "summary.json").read_text()))
    undisturbed, disturbed = summaries
    assert disturbed["content_hash"] == undisturbed["content_hash"]
    assert disturbed["metrics"] == undisturbed["metrics"]
