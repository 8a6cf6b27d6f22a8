"""CF step on real Ray Train workers, with lost workers, and as a command that is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import ray
import torch
import yaml
from ray.train.torch import TorchTrainer

from collm_dist.cf.cross_fit import fit_job
from collm_dist.cf.fitting import build_untrained
from collm_dist.cf.jobs import Job
from collm_dist.cf.model_export import export_models
from collm_dist.cf.model_files import load_cf_model, load_model
from collm_dist.cf.trainer import gather_metrics
from collm_dist.cf.user_shards import load_worker_data, number_globally
from collm_dist.config import Config
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ArtifactError, LaunchError
from collm_dist.monitoring import read_metrics
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.pretrain import run_pretrain
from collm_dist.runs.forced_redo import track_redo
from tests.unit.cf_data import MODELS, make_cf
from tests.unit.evaluation_run import NUM_USERS, build_config, write_data_step
from tests.unit.test_cf_model_files import ITEMS, USERS, write_tables
from tests.unit.test_own_cf_model import write_vectors

NUM_EPOCHS = 120


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


def compute_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


def kill_worker_at(run_dir, epoch, killed):
    """Send SIGKILL to one of this test's Ray Train workers once the log contains the epoch."""
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
    assert summary["baselines"]["bias_logistic"][split]["auc"] > 0.6
    assert summary["epochs"] == NUM_EPOCHS
    assert 0 < summary["best_epoch"] <= NUM_EPOCHS
    assert summary["metrics"]["valid"]["auc"] > 0.6
    assert summary == run_dir.read_record("cf")
    assert [line["step"] for line in read_metrics(run_dir.step_dir("cf") / "metrics.jsonl")] == [
        *range(1, NUM_EPOCHS + 1)
    ]
    assert not (run_dir.step_dir("cf") / "checkpoints").exists()
    assert load_cf_model(run_dir, load_manifest(run_dir.step_dir("data"))).embedding_dim == 5


def test_done_step_is_skipped_and_a_changed_one_stops(undisturbed, capsys):
    run_dir, summary = undisturbed
    before = (run_dir.step_dir("cf") / "model.safetensors").stat().st_mtime_ns
    assert run_pretrain(make_config(run_dir.path, num_workers=1), run_dir) == summary
    assert "done already" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match=r"config\.cf\.embedding_dim: 4 -> 8"):
        run_pretrain(make_config(run_dir.path, embedding_dim=8), run_dir)
    assert (run_dir.step_dir("cf") / "model.safetensors").stat().st_mtime_ns == before


class Interrupted(Exception):
    """Interruption of a training between two checkpoints."""


def fit_until(job, rank, world_size, last_epoch):
    """Train up to an epoch; the checkpoint on disk is an earlier one."""

    def interrupt(epoch, _):
        if epoch == last_epoch:
            raise Interrupted

    with contextlib.suppress(Interrupted):
        fit_job(job, torch.device("cpu"), rank, world_size, interrupt)


def fit_on_two(settings):
    """Run one of two Ray Train workers."""
    context = ray.train.get_context()
    for job, last_epoch in settings["jobs"]:
        fit_until(job, context.get_world_rank(), context.get_world_size(), last_epoch)


# Small batches of histories of all lengths, so the amount of padding differs between one and two workers.
RAGGED = {"dropout": 0.3, "feedback": "all", "global_batch_size": 24, "history_length": 10, "unknown_item_share": 0.05}
JOBS = (*MODELS, "table", "mf in folds", "sasrec in folds", "mf in texts", "lightgcn in texts")
FOLD_STARTS = (130, 260, 400)  # a row's number is its timestamp; the last one is the end of the training rows


def make_jobs(run_dir, folder, how):
    """Return one job of each kind, each with its own folder."""
    write_tables(run_dir, USERS, ITEMS)
    random, tables = np.random.default_rng(0), {}
    for name, ids in (("user_vectors", USERS), ("item_vectors", ITEMS)):
        tables[name] = write_vectors(folder / f"{name}.parquet", ids, random.normal(size=(len(ids), 4)))
    texts = folder / "item_text.npy"
    np.save(texts, random.normal(size=(len(ITEMS), 5)).astype(np.float32))
    jobs = {}
    for name in JOBS if how in ("one", "two") else MODELS:
        model, _, extra = name.partition(" in ")
        settings = RAGGED | (tables if model == "table" else {}) | ({"fold_epochs": 2} if extra == "folds" else {})
        states = folder / how / name
        states.mkdir(parents=True)
        jobs[name] = Job(
            run_dir.step_dir("data"),
            states,
            "key",
            make_cf(model, **settings),
            0,
            FOLD_STARTS if extra == "folds" else (),
            item_text=texts if extra == "texts" else None,
        )
    return jobs


@pytest.fixture(scope="module")
def by_one_and_two(ray_session, tmp_path_factory):
    """Return ({(model, how): Job}, manifest, users): all models trained by one worker, by two, and by both in turn."""
    folder = tmp_path_factory.mktemp("models")
    run_dir = write_data_step(folder, num_slices=2)  # as a run that was extended once
    data_dir = run_dir.step_dir("data")
    ways = ("one", "two", "one then two", "two then one")
    jobs = {(name, how): job for how in ways for name, job in make_jobs(run_dir, folder, how).items()}
    for (_, how), job in jobs.items():
        if how in ("one", "one then two"):
            fit_until(job, 0, 1, 5 if how == "one then two" else None)
    on_two = [(job, 5 if how == "two then one" else None) for (_, how), job in jobs.items() if how != "one"]
    on_interrupt = signal.getsignal(signal.SIGINT)
    TorchTrainer(
        fit_on_two,
        train_loop_config={"jobs": on_two},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(name="two", storage_path=str(folder / "ray")),
    ).fit()
    signal.signal(
        signal.SIGINT, on_interrupt
    )  # Ray Train leaves its own handler, which calls a cluster that no longer exists
    for (_, how), job in jobs.items():
        if how == "two then one":
            assert job.read_state("final").progress.epoch == 4  # an epoch before the interruption
            fit_until(job, 0, 1, None)
    manifest = load_manifest(data_dir)
    return jobs, manifest, load_worker_data(data_dir, manifest).users


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "two") for name in JOBS] + [(name, how) for name in MODELS for how in ("one then two", "two then one")],
)
def test_any_number_of_workers_ends_with_the_same_weights(by_one_and_two, name, how):
    """With dropout, with folds, and with a change of workers between two checkpoints.

    Measured: metrics differ by up to 2e-8, weights by up to 9e-7, except the key biases of sasrec: the softmax is
    invariant to them, so their gradient is only rounding.
    """
    jobs, _, users = by_one_and_two
    for part in jobs[name, "one"].list_models():
        ours, theirs = jobs[name, how].read_state(part), jobs[name, "one"].read_state(part)
        assert (ours.progress.epoch, ours.progress.best_epoch) == (theirs.progress.epoch, theirs.progress.best_epoch)
        assert ours.progress.best_metrics == pytest.approx(theirs.progress.best_metrics, abs=1e-6)
        for group in ("model", "best"):  # after the last epoch, and after the best one
            weights, expected = (state.read_shared(group) | state.read_owned(group, users) for state in (ours, theirs))
            seen = {key for key in weights if not key.endswith("key.bias")}
            assert compute_difference({key: weights[key] for key in seen}, {key: expected[key] for key in seen}) < 1e-5
    assert len(jobs[name, how].read_state("final").parts) == (1 if how == "two then one" else 2)


@pytest.mark.parametrize("name", JOBS)
def test_exports_of_one_and_two_workers_are_equal(by_one_and_two, tmp_path, name):
    """Measured: they differ by up to 8e-7."""
    jobs, manifest, _ = by_one_and_two
    by_file = {}
    for how in ("one", "two"):
        export_models(jobs[name, how], tmp_path / how, manifest)
        for path in sorted((tmp_path / how).glob("*.safetensors")):
            model = load_model(path)[1]
            users, history = torch.arange(NUM_USERS), torch.arange(3).expand(NUM_USERS, 3)
            by_file[how, path.name] = torch.cat([model.user_vectors(users, history, users), model.item_vectors(users)])
    assert len(by_file) == 2 * len(jobs[name, "one"].list_models())
    for (how, file), vectors in by_file.items():
        assert (vectors - by_file["one", file]).abs().max() < 1e-5, (how, file)
        assert vectors.abs().max() > 0.1


SAMPLE_SIZES = (1000, 20, 9)  # of 61 contexts


def measure_samples(data_dir, rank, world_size):
    """Return the metrics of a model that is not trained, over samples of the validation rows."""
    manifest = load_manifest(data_dir)
    data = load_worker_data(data_dir, manifest, rank, world_size)
    rows = {name: number_globally(part, data.users) for name, part in data.splits.items()}
    model = build_untrained(make_cf("mf", init_scale=1.0), manifest, data.users, rows["train"], 0)
    return {size: gather_metrics(model, rows["valid"], size) for size in SAMPLE_SIZES}


def measure_on_two(settings):
    """Run one of two Ray Train workers."""
    context = ray.train.get_context()
    found = measure_samples(settings["data_dir"], context.get_world_rank(), context.get_world_size())
    settings["out"].with_suffix(f".{context.get_world_rank()}").write_text(json.dumps(found))


@pytest.mark.slow
def test_one_and_two_workers_measure_the_same_sample(ray_session, tmp_path):
    """The metrics that select the epoch. Measured: equal."""
    data_dir = write_data_step(tmp_path).step_dir("data")
    on_interrupt = signal.getsignal(signal.SIGINT)
    TorchTrainer(
        measure_on_two,
        train_loop_config={"data_dir": data_dir, "out": tmp_path / "found"},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(name="two", storage_path=str(tmp_path / "ray")),
    ).fit()
    signal.signal(signal.SIGINT, on_interrupt)  # see by_one_and_two
    expected = measure_samples(data_dir, 0, 1)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found.{rank}").read_text())
        for size in SAMPLE_SIZES:
            assert found[str(size)] == pytest.approx(expected[size], abs=1e-9)
    assert len({metrics["logloss"] for metrics in expected.values()}) == len(SAMPLE_SIZES)


def test_several_seeds_with_folds(ray_session, tmp_path):
    run_dir = write_data_step(tmp_path)
    summary = run_pretrain(make_config(tmp_path, seeds=[3, 4, 5], cross_fit=3, fold_epochs=2, num_epochs=8), run_dir)
    values = [summary["seeds"][str(seed)]["test"]["auc"] for seed in (3, 4, 5)]
    assert len(set(values)) == 3
    assert summary["spread"]["test"]["auc"]["mean"] == pytest.approx(np.mean(values))
    assert summary["spread"]["test"]["auc"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert summary["metrics"]["test"]["auc"] == values[0]
    assert len(summary["fold_starts"]) == 3
    files = {path.name for path in run_dir.step_dir("cf").glob("*.safetensors")}
    assert files == {"fold-01.safetensors", "fold-02.safetensors", "model.safetensors"}
    assert (run_dir.step_dir("cf") / "seeds" / "5" / "metrics.jsonl").exists()


def test_checkpoints_on_another_disk_are_deleted_there(ray_session, tmp_path):
    run_dir, disk = write_data_step(tmp_path), tmp_path / "disk"
    disk.mkdir()
    run_dir.step_dir("cf").mkdir()
    (run_dir.step_dir("cf") / "checkpoints").symlink_to(disk)
    config = make_config(tmp_path, num_epochs=2)
    run_pretrain(config, run_dir)
    assert not list(disk.iterdir())
    (run_dir.step_dir("cf") / "model.safetensors").unlink()
    (disk / "result.json").write_text("{}")  # as of a redo that was killed at its end
    run_pretrain(config, run_dir, force=True)
    assert (run_dir.step_dir("cf") / "model.safetensors").exists()
    assert (run_dir.step_dir("cf") / "checkpoints").is_symlink()
    assert not list(disk.iterdir())


def test_a_forced_redo_that_was_interrupted_is_not_begun_again(ray_session, tmp_path):
    run_dir, config, written = write_data_step(tmp_path), make_config(tmp_path, num_epochs=2), []
    for is_interrupted in (True, False, False):
        with contextlib.suppress(KeyboardInterrupt), track_redo(run_dir, ["cf"], is_owner=True):
            run_pretrain(config, run_dir, force=True)
            written.append((run_dir.step_dir("cf") / "model.safetensors").stat().st_mtime_ns)
            if is_interrupted:
                raise KeyboardInterrupt
    assert written[0] == written[1] < written[2]


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


@pytest.mark.slow
def test_workers_find_relative_vectors(ray_session, tmp_path, monkeypatch):
    """Ray was started in another folder."""
    run_dir = write_data_step(tmp_path)
    write_tables(run_dir, USERS, ITEMS)
    monkeypatch.chdir(tmp_path)
    write_vectors("items.parquet", ITEMS, np.eye(len(ITEMS), 3))
    config = make_config(tmp_path, model="table", item_vectors="items.parquet", num_workers=2, num_epochs=1)
    assert run_pretrain(config, run_dir)["epochs"] == 1


def test_too_many_workers_are_refused(ray_session, tmp_path):
    run_dir = write_data_step(tmp_path)
    with pytest.raises(LaunchError, match=r"cf\.num_workers: 3 workers need a CPU each, Ray has 2"):
        run_pretrain(make_config(tmp_path, num_workers=3), run_dir)


def test_a_model_below_the_baselines_gives_warnings(ray_session, tmp_path, capsys):
    run_dir = write_data_step(tmp_path)
    summary = run_pretrain(make_config(tmp_path, init_scale=3.0, learning_rate=1e-6, num_epochs=2), run_dir)
    assert summary["beats"]["item_mean"]["valid"] is False
    assert summary["beats"]["bias_logistic"]["test"] is False
    output = capsys.readouterr().out
    assert "!!!! WARNING: on valid the model" in output
    assert "does not beat the baseline bias_logistic" in output
    assert len(summary["warnings"]) == 2
    assert "on test" not in " ".join(summary["warnings"])  # who tunes by test has no test rows any more


@pytest.mark.slow
def test_a_killed_command_resumes_and_ends_with_the_same_weights(undisturbed, tmp_path, repository):
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
    assert (run_dir.step_dir("cf") / "checkpoints" / "seed-0" / "final" / "state.json").exists()
    subprocess.run(command, check=True, env=environment)
    assert run_dir.read_record("cf")["content_hash"] == undisturbed[1]["content_hash"]
    assert read_steps(run_dir) == [*range(1, NUM_EPOCHS + 1)]
