"""Ctrl-C and SIGTERM in commands: exit code, message, no half-written outputs, and the same command again.

Tuning: tests/distributed/test_faults.py. The service: tests/integration/test_serve.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collm_dist.commands import evaluate_model, export_model, import_model
from collm_dist.config.loader import load_config
from collm_dist.data.shards.interactions import load_item_table
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.export import export_model as write_export
from collm_dist.serving.licences import Licences
from tests.conftest import REPOSITORY

CODES = {"SIGINT": 130, "SIGTERM": 75, "SIGUSR1": 75}
MESSAGES = {
    "SIGINT": "interrupted; run the same command again to resume",
    "SIGTERM": "run the same command again to resume",
}
_TIMEOUT_SECONDS = 300


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A finished run in the folder ``run``, which is in the working directory."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(folder)
    return folder


def fork(main, *arguments):
    """Run a command in a forked process, which need not load its libraries, and return its pid."""
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = ["command", *arguments]
            code = main()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(output)
    return pid


def wait(pid, condition=lambda: False):
    """Wait for a condition and return None, or for the end of the process and return its exit code."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not condition():
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return None


def list_hidden(folder):
    return sorted(path.name for path in folder.rglob(".*") if path.name not in (".hashes.json", ".lock.guard"))


def interrupt(folder, name, condition, main, *arguments):
    """Interrupt a command once a condition holds, and check what it leaves; then run it to its end."""
    pid = fork(main, *arguments)
    output = folder / "output.txt"
    assert wait(pid, condition) is None, output.read_text()
    os.kill(pid, getattr(signal, name))
    assert wait(pid) == CODES[name], output.read_text()
    text = output.read_text()
    assert MESSAGES[name] in text
    assert "Traceback" not in text
    assert list_hidden(folder) == []
    yield
    assert wait(fork(main, *arguments)) == 0, output.read_text()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_export_or_import_leaves_nothing(folder, name):
    def is_there():
        return any(folder.glob(".*.part"))

    # So that there is time to be interrupted.
    (folder / "run" / "stage1" / "merged" / "more.bin").write_bytes(bytes(64 << 20))
    for main, target, arguments in (
        (export_model.main, "exported", ["--config", "run/config.yaml", "--output", "exported"]),
        (import_model.main, "imported", ["--input", "exported", "--run-dir", "imported"]),
    ):
        for _ in interrupt(folder, name, is_there, main, *arguments):
            assert not (folder / target).exists()
        assert (folder / target / "config.yaml").exists()
        assert list_hidden(folder) == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_evaluation_leaves_no_report(folder, name):
    def has_begun():
        return "eval: scoring" in (folder / "output.txt").read_text()

    settings = ["evaluation.bootstrap_samples=20", "monitoring.progress_bar=false"]
    for _ in interrupt(folder, name, has_begun, evaluate_model.main, "--config", "run/config.yaml", *settings):
        assert not (folder / "run" / "eval" / "report.json").exists()
    assert (folder / "run" / "eval" / "report.json").exists()


def start(*arguments):
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment | {"OMP_NUM_THREADS": "1"}, **pipes)


def stop_and_run_again(name, condition, arguments):
    process = start(*arguments)
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=_TIMEOUT_SECONDS)
    assert process.returncode == CODES[name], output
    assert MESSAGES[name] in output
    assert "Traceback" not in output
    yield
    process = start(*arguments)
    output, _ = process.communicate(timeout=_TIMEOUT_SECONDS)
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_data_step_and_cf_training_go_on(tiny_ratings, tmp_path, name):
    run = RunDir(tmp_path / "run")
    settings = ["--config", "configs/tiny_cpu.yaml", f"run.dir={run.path}", "cf.num_epochs=400",
                "cf.early_stop_patience=400", "cf.checkpoint_every_epochs=2",
                f"dataset.path={tiny_ratings}/ratings.csv", f"dataset.items_path={tiny_ratings}/items.csv"]  # fmt: skip
    begun = {
        "preprocess_data": lambda: any(run.path.glob("data/.work-*/*")),
        "pretrain_cf": lambda: any(run.path.glob("cf/checkpoints/*/*")),
    }
    for script, step in (("preprocess_data", "data"), ("pretrain_cf", "cf")):
        for _ in stop_and_run_again(name, begun[script], [f"launch/{script}.py", *settings]):
            assert not run.is_done(step)
            assert not any(run.path.rglob("*.tmp"))
        assert run.is_done(step)
    assert not any(run.path.glob("data/.work-*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ranking_of_a_file_goes_on(finished_run, tmp_path, name):
    items = load_item_table(finished_run / "data")["item_id"]
    rows = [{"user_id": f"u{number}", "candidates": items, "history": items[:3]} for number in range(600)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "users.parquet")
    output = tmp_path / "ranked"
    arguments = ["launch/score_candidates.py", "--config", finished_run / "config.yaml"]
    arguments += ["--input", tmp_path / "users.parquet", "--output", output, "--rows-per-part", "10"]
    kept = []
    for _ in stop_and_run_again(name, lambda: any(output.glob("records/*.json")), arguments):
        assert not (output / "summary.json").exists()
        kept += [(path, path.stat().st_mtime_ns) for path in output.glob("records/*.json")]
    assert json.loads((output / "summary.json").read_text())["resumed_at"] >= len(kept) > 0
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept)
    assert len(list(output.glob("scores/*.parquet"))) == 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_search_goes_on(finished_run, tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / "data").symlink_to(finished_run / "data")
    config = load_config(finished_run / "config.yaml")
    arguments = ["launch/search.py", "--step", "cf", "--config", "configs/tiny_cpu.yaml", f"run.dir={run}"]
    arguments += [f"dataset.path={config.dataset.path}", f"dataset.items_path={config.dataset.items_path}"]
    arguments += ["cf_search.num_trials=3", "cf_search.parallel_trials=1", "cf.num_epochs=60", "cf.cross_fit=2"]
    folder = run / "cf_search"
    for _ in stop_and_run_again(name, lambda: any(folder.glob("trials/*/checkpoints/result.json")), arguments):
        assert json.loads((folder / "status.json").read_text())["exit_code"] == CODES[name]
        assert not (folder / "summary.json").exists()
    assert (folder / "best.yaml").exists()


def test_the_hidden_files_of_an_export_are_found(folder):
    """So that the checks above can fail."""
    write_export(load_config("run/config.yaml"), RunDir(folder / "run"), folder / "exported", Licences("a", "b", "c"))
    (folder / ".exported.x.part").mkdir()
    assert list_hidden(folder) == [".exported.x.part"]
