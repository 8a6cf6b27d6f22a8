"""The CF step on real Ray Train workers, which die; and as a command, which is killed."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import safetensors.torch
import yaml

from collm_dist.cf.checkpoint import Progress, read_state, take_group
from collm_dist.cf.export import load_cf_model
from collm_dist.cf.trainer import train_cf
from collm_dist.config import Config
from collm_dist.data.manifest import load_manifest
from collm_dist.errors import ArtifactError, LaunchError
from collm_dist.monitoring import read_metrics
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.pretrain import build_model, build_plan, load_rows, run_pretrain
from collm_dist.orchestration.pretrain_summary import print_summary, summarize
from tests.unit.evaluation_run import build_config, write_data_step

NUM_EPOCHS = 300


def make_config(path, **cf) -> Config:
    settings = {
        "embedding_dim": 4,
        "global_batch_size": 64,
        "learning_rate": 1e-2,
        "weight_decay": 1.0,
        "num_epochs": NUM_EPOCHS,
        "early_stop_patience": NUM_EPOCHS,
        "checkpoint_every_epochs": 20,
    }
    config = build_config(path).model_dump(mode="json")
    return Config.model_validate(
        config
        | {
            "cf": settings | cf,
            "cluster": {"ray_num_cpus": 2},
            "monitoring": {"progress_bar": False, "tensorboard": False},
        }
    )


@pytest.fixture(scope="module")
def ray_session(tmp_path_factory):
    with connect_ray(make_config(tmp_path_factory.mktemp("ray")).cluster):
        yield


@pytest.fixture(scope="module")
def undisturbed(ray_session, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-workers")
    run_dir = write_data_step(folder)
    return run_dir, run_pretrain(make_config(folder, num_workers=2), run_dir)


def read_steps(run_dir):
    return [line["step"] for line in read_metrics(run_dir.step_dir("cf") / "metrics.jsonl")]


def load_tensors(run_dir):
    return safetensors.torch.load_file(run_dir.step_dir("cf") / "model.safetensors")


def compute_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def kill_worker_at(run_dir, epoch, killed):
    """SIGKILL one of this test's own Ray Train workers once the log says that the epoch is over."""
    path = run_dir.step_dir("cf") / "metrics.jsonl"
    while not killed:
        lines = read_metrics(path)
        if lines and lines[-1]["step"] >= epoch:
            for process in psutil.Process().children(recursive=True):
                if "TrainWorker" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(lines[-1]["step"])
                    break
        time.sleep(0.005)


def test_summary(undisturbed):
    run_dir, summary = undisturbed
    assert set(summary["metrics"]) == {"valid", "test"}
    for split in ("valid", "test"):
        assert {"auc", "uauc", "logloss"} <= set(summary["metrics"][split])
        assert {"auc", "uauc", "logloss"} <= set(summary["baselines"]["item_mean"][split])
    assert summary["epochs"] == NUM_EPOCHS
    assert 0 < summary["best_epoch"] <= NUM_EPOCHS
    assert summary["metrics"]["valid"]["auc"] > 0.6
    assert summary == run_dir.read_record("cf")
    assert [line["step"] for line in read_metrics(run_dir.step_dir("cf") / "metrics.jsonl")] == [
        *range(1, NUM_EPOCHS + 1)
    ]
    assert not (run_dir.step_dir("cf") / "checkpoints").exists()
    assert load_cf_model(run_dir, load_manifest(run_dir.step_dir("data"))).embedding_dim == 4


def test_done_step_is_skipped_and_a_changed_one_stops(undisturbed, capsys):
    run_dir, summary = undisturbed
    before = (run_dir.step_dir("cf") / "model.safetensors").stat().st_mtime_ns
    assert run_pretrain(make_config(run_dir.path, num_workers=1), run_dir) == summary
    assert "done already" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match=r"config\.cf\.embedding_dim: 4 -> 8"):
        run_pretrain(make_config(run_dir.path, embedding_dim=8), run_dir)
    assert (run_dir.step_dir("cf") / "model.safetensors").stat().st_mtime_ns == before


def test_two_workers_end_where_one_does(undisturbed, tmp_path):
    """Measured: weights differ by up to 8e-7 after 2,100 steps of Adam, which carries rounding along."""
    run_dir, summary = undisturbed
    data_dir, cf = run_dir.step_dir("data"), make_config(tmp_path).cf
    train, valid = load_rows(data_dir, "train"), load_rows(data_dir, "valid")
    model = build_model(cf, load_manifest(data_dir), train, seed=0)
    path = tmp_path / "last.safetensors"
    progress = train_cf(
        model, train, valid, build_plan(cf, 0), checkpoint_path=path, key="key", on_epoch=lambda *_: None
    )
    assert progress.best_epoch == summary["best_epoch"]
    model.load_state_dict(take_group(read_state(path, "key")[0], "best"))
    model.fix_scales()
    assert compute_difference(model.state_dict(), load_tensors(run_dir)) < 1e-4


@pytest.mark.slow
def test_a_worker_that_dies_changes_nothing(undisturbed, tmp_path):
    run_dir = write_data_step(tmp_path)
    killed = []
    killer = threading.Thread(target=kill_worker_at, args=(run_dir, 50, killed), daemon=True)
    killer.start()
    summary = run_pretrain(make_config(tmp_path, num_workers=2), run_dir)
    killer.join(5)
    assert killed
    assert 50 <= killed[0] < NUM_EPOCHS
    assert summary["metrics"] == undisturbed[1]["metrics"]
    assert summary["content_hash"] == undisturbed[1]["content_hash"]
    assert read_steps(run_dir) == [*range(1, NUM_EPOCHS + 1)]


def test_too_many_workers_are_refused(ray_session, tmp_path):
    run_dir = write_data_step(tmp_path)
    with pytest.raises(LaunchError, match=r"cf\.num_workers: 3 workers need a CPU each, Ray has 2"):
        run_pretrain(make_config(tmp_path, num_workers=3), run_dir)


def test_a_model_below_the_item_mean_says_so(tmp_path, capsys):
    run_dir = write_data_step(tmp_path)
    data_dir = run_dir.step_dir("data")
    splits = {split: load_rows(data_dir, split) for split in ("train", "valid", "test")}
    manifest = load_manifest(data_dir)
    model = build_model(make_config(tmp_path, init_scale=3.0).cf, manifest, splits["train"], seed=0)
    summary = summarize(model, data_dir, manifest, splits, Progress(epoch=1, best_epoch=1), num_epochs=1)
    assert summary["beats_item_mean"]["valid"] is False
    assert len(summary["warnings"]) == 3
    print_summary({"model": "mf", **summary}, tmp_path)
    assert "!!!! WARNING: on valid the model" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_where_it_would_have(undisturbed, tmp_path, repository):
    run_dir = write_data_step(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(tmp_path, num_workers=2).model_dump(mode="json")))
    command = [sys.executable, str(repository / "launch" / "pretrain_cf.py"), "--config", str(path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    log = run_dir.step_dir("cf") / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(log)) < 50:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)  # Ray's processes end with their driver
    assert not run_dir.is_done("cf")
    assert (run_dir.step_dir("cf") / "checkpoints" / "last.safetensors").exists()
    subprocess.run(command, check=True, env=environment)
    assert run_dir.read_record("cf")["content_hash"] == undisturbed[1]["content_hash"]
    assert read_steps(run_dir) == [*range(1, NUM_EPOCHS + 1)]
