"""Tuning stages as Ray Train workers: on one and two nodes, with lost workers and nodes, and with a stopped driver.

Nodes are processes of one machine (``ray.cluster_utils.Cluster``), each with its own scheduler and workers.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
import safetensors.numpy
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from collm_dist.config import ClusterConfig
from collm_dist.config.loader import load_config
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import LaunchError, NonFiniteError, Preempted
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.tune import count_workers, run_on_workers
from collm_dist.runs.run_dir import RunDir
from tests.distributed.conftest import (
    LONGER,
    PIPELINE,
    REPOSITORY,
    assert_same_report,
    read_status,
    run,
    start,
    wait_for_step,
)
from tests.distributed.test_tuning import assert_same_training

ON_RAY = ["cluster.tuning=ray", "cluster.num_processes=2"]


@pytest.fixture
def cluster():
    """Return a Ray cluster, whose head has no CPUs, and its two nodes of one CPU each."""
    ray_cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [ray_cluster.add_node(num_cpus=1) for _ in range(2)]
    ray_cluster.wait_for_nodes()
    yield ray_cluster, nodes
    ray_cluster.shutdown()


def list_training():
    """Return the processes of busy Ray Train workers."""
    names = {process: "".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])}
    return sorted(
        (process for process, name in names.items() if "RayTrainWorker" in name), key=lambda process: process.pid
    )


def test_there_is_one_worker_per_device():
    assert count_workers(None, {"CPU": 8.0}) == (1, False)
    assert count_workers(3, {"CPU": 8.0}) == (3, False)
    assert count_workers(None, {"CPU": 8.0, "GPU": 4.0}) == (4, True)
    with pytest.raises(LaunchError, match="5 workers need a GPU each, the cluster has 4"):
        count_workers(5, {"CPU": 8.0, "GPU": 4.0})


@pytest.fixture(scope="module")
def ray_session(prepared_run):
    """A local Ray with one CPU, in the folder that the tests run in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        with connect_ray(ClusterConfig(ray_num_cpus=1, object_store_gb=0.1)):
            yield


def build_stage1(overrides):
    """Return the configuration and run directory of a stage 1 on one worker."""
    config = load_config(REPOSITORY / "configs" / "tiny_cpu.yaml", [*overrides, "cluster.tuning=ray"])
    return config, RunDir(Path(config.run.dir))


def test_workers_find_relative_paths(ray_session, copy_run, tmp_path, monkeypatch):
    """Here a prompt's file; Ray was started in another folder."""
    config, run_dir = build_stage1([*copy_run("run")[1], "prompt.stage1=own.txt"])
    monkeypatch.chdir(tmp_path)
    Path("own.txt").write_text("<ItemTitleList>: <TargetItemTitle>? Answer:")
    run_on_workers(config, run_dir, "stage1", force=False)
    assert run_dir.read_record("stage1")["fingerprint"] == compute_step_fingerprint(config, run_dir, "stage1")


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)],
)
@pytest.mark.slow
def test_a_signal_that_arrives_while_a_step_ends_is_not_lost(ray_session, copy_run, number, error):
    """The worker has written the record of stage 1 and ends; the next step must not begin."""
    config, run_dir = build_stage1(copy_run("run")[1])

    def send_at_end():
        while not run_dir.is_done("stage1"):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_at_end, daemon=True)
    sender.start()
    with pytest.raises(error):
        run_on_workers(config, run_dir, "stage1", force=False)
    assert not (run_dir.path / ".workers").exists()


@pytest.mark.slow
def test_two_nodes_equal_one_process(cluster, copy_run, one_process):
    ray_cluster, _ = cluster
    folder, overrides = copy_run("two")
    output = run(PIPELINE, [*overrides, *ON_RAY, *LONGER, f"cluster.ray_address={ray_cluster.address}"])
    assert "stage2: 30 steps" in output
    assert output.count("\nreport: ") == 1
    assert json.loads((folder / "stage2" / "summary.json").read_text())["world_size"] == 2
    assert_same_training(folder, one_process)
    assert_same_report(folder, one_process)
    assert not (folder / ".workers").exists()


@pytest.mark.slow
def test_a_lost_worker_and_a_lost_node(cluster, copy_run, one_process):
    """A worker is killed in stage 1 and a node in stage 2; each time the stage resumes from its checkpoint."""
    ray_cluster, nodes = cluster
    folder, overrides = copy_run("lost")
    process = start(PIPELINE, [*overrides, *ON_RAY, *LONGER, f"cluster.ray_address={ray_cluster.address}"])
    wait_for_step(process, folder, "stage1", 5)
    list_training()[-1].kill()
    wait_for_step(process, folder, "stage2", 5)
    ray_cluster.remove_node(nodes[0], allow_graceful=False)
    ray_cluster.add_node(num_cpus=1)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    status = read_status(folder)
    assert (status["state"], status["restarts"]) == ("done", 2)
    assert output.count("WorkerLostError: ") >= 2
    assert_same_training(folder, one_process)
    ours, other = (
        safetensors.numpy.load_file(run_dir / "stage2" / "mapping.safetensors") for run_dir in (folder, one_process)
    )
    for name, value in ours.items():
        assert abs(value - other[name]).max() < 1e-4
    assert_same_report(folder, one_process)


@pytest.mark.slow
def test_a_whole_job_on_two_nodes_that_loses_a_worker(prepared_run, one_process, tmp_path):
    """A job as of ``ray job submit``, through the job service, which uploads a working directory.

    The data and CF steps run on both nodes too. Each node has its own temporary folder, as a machine would: in a shared
    one, a node deletes the working directory while its peers still use it. Socket paths in it must be short.
    """
    with socket.socket() as probe, socket.socket() as other:
        for free in (probe, other):
            free.bind(("127.0.0.1", 0))
        port, agent_port = probe.getsockname()[1], other.getsockname()[1]
    # The agent's usual port may be taken by another Ray on this machine; it would then accept no job.
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port, "dashboard_agent_listen_port": agent_port}
    ray_cluster = Cluster(initialize_head=True, head_node_args=head)
    for name in ("launch", "configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / "work" / name)
    folder = tmp_path / "run"
    settings = [*prepared_run[1], f"run.dir={folder}", "cf.num_workers=2", *ON_RAY, *LONGER]
    killed = False
    folders = [tempfile.mkdtemp(prefix="ray-") for _ in range(2)]
    try:
        for temp_dir in folders:
            ray_cluster.add_node(num_cpus=1, temp_dir=temp_dir)
        ray_cluster.wait_for_nodes()
        client, deadline = JobSubmissionClient(f"http://127.0.0.1:{port}"), time.monotonic() + 400
        job = submit(client, settings, tmp_path / "work", deadline)
        while not client.get_job_status(job).is_terminal():
            assert time.monotonic() < deadline, client.get_job_logs(job)
            log = folder / "stage2" / "metrics.jsonl"
            if not killed and log.exists() and '"step": 5,' in log.read_text():
                list_training()[-1].kill()
                killed = True
            time.sleep(0.05)
        assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)
    finally:
        ray_cluster.shutdown()
        for temp_dir in folders:
            shutil.rmtree(temp_dir, ignore_errors=True)
    assert killed
    assert (read_status(folder)["state"], read_status(folder)["restarts"]) == ("done", 1)
    assert_same_training(folder, one_process)
    assert_same_report(folder, one_process)


def submit(client, settings, working_dir, deadline):
    """Submit the pipeline and return the job's id."""
    quoted = " ".join(shlex.quote(setting) for setting in settings)
    while True:
        try:
            return client.submit_job(
                entrypoint=f"{sys.executable} launch/run_pipeline.py --config configs/tiny_cpu.yaml {quoted}",
                runtime_env={"working_dir": str(working_dir)},
            )
        except RuntimeError as error:  # the service answers before it can run a job
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


@pytest.mark.slow
def test_a_stopped_driver(copy_run):
    """The workers, on a local Ray, save a checkpoint after the current step."""
    folder, overrides = copy_run("stopped")
    process = start(PIPELINE, [*overrides, *ON_RAY, *LONGER, "stage1.checkpoint_every_steps=1000"])
    wait_for_step(process, folder, "stage1", 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == Preempted.exit_code, output
    assert read_status(folder)["state"] == "interrupted"
    assert any((folder / "stage1" / "checkpoints").iterdir())
    assert not list_training()


@pytest.mark.slow
def test_a_workers_error_is_reported(copy_run):
    """A worker's error ends the pipeline with the same message and exit code as without Ray, and without a restart."""
    folder, overrides = copy_run("error")
    process = start(PIPELINE, [*overrides, *ON_RAY, "stage1.learning_rate=1e30", "stage1.warmup_steps=0"])
    output, _ = process.communicate(timeout=200)
    assert process.returncode == NonFiniteError.exit_code, output
    status = read_status(folder)
    assert (status["error"], status["restarts"]) == ("NonFiniteError", 0)
    assert f"NonFiniteError: {status['message']}" in output


@pytest.mark.slow
def test_a_node_with_other_versions(cluster, copy_run, tmp_path):
    """One node's PYTHONPATH holds a package with another version."""
    ray_cluster, _ = cluster
    package = tmp_path / "site" / "torch-9.9.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    ray_cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(package.parent)})
    _, overrides = copy_run("versions")
    process = start(PIPELINE, [*overrides, *ON_RAY, f"cluster.ray_address={ray_cluster.address}"])
    output, _ = process.communicate(timeout=100)
    assert process.returncode == LaunchError.exit_code, output
    assert "has torch 9.9 (here" in output


@pytest.mark.slow
def test_an_unnamed_cluster_is_not_joined(cluster):
    """By default, Ray joins any cluster that it finds on the machine."""
    with connect_ray(ClusterConfig(ray_num_cpus=1, object_store_gb=0.1)):
        assert len(ray.nodes()) == 1
