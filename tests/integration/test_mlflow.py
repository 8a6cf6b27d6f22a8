"""Runs in a real MLflow server: settings, curves, report, model registry; kills, and a server that hangs or is gone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from collm_dist.config.loader import load_config
from collm_dist.monitoring import track_run
from collm_dist.runs.promotion import promote
from collm_dist.runs.run_dir import RunDir
from tests.integration.mlflow_server import serve_mlflow

pytest.importorskip("mlflow", reason="needs pip install 'collm-dist[mlflow]'")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SECRET = "not-to-be-written-anywhere"
WARNING = "did not accept the run's values"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve_mlflow(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.uri, registry_uri=server.uri)


@pytest.fixture(autouse=True)
def _secret(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)


@pytest.fixture
def track(server, finished_run, tmp_path):
    """Return a function that copies the finished run once by name, tracks it, and returns its directory."""

    def run(name, *settings, force=(), uri=server.uri, act=lambda config, run_dir: None):
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(finished_run, folder)
        overrides = [f"run.dir={folder}", f"monitoring.mlflow.tracking_uri={uri}", *settings]
        config = load_config(finished_run / "config.yaml", overrides)
        with track_run(config, RunDir(folder), force, is_owner=True):
            act(config, RunDir(folder))
        return folder

    return run


def launch(script, folder, *arguments):
    """Start a command on a run directory with its own settings."""
    command = [sys.executable, f"launch/{script}.py", "--config", str(folder / "config.yaml"), f"run.dir={folder}"]
    return subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)  # fmt: skip


def find_run(client, folder):
    """Return the MLflow run of a run directory; there must be exactly one with its key, or ValueError."""
    key = json.loads((folder / "mlflow.json").read_text())["key"]
    experiment = client.get_experiment_by_name("collm-dist")
    if experiment is None:
        raise ValueError("no experiment yet")
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`collm_dist.key` = '{key}'")
    return found


def read_sent(client, run_id):
    """Return (name, step) -> value of all points, each of which must be there once."""
    names = client.get_run(run_id).data.metrics
    points = [(name, point.step, point.value) for name in names for point in client.get_metric_history(run_id, name)]
    counts = Counter((name, step) for name, step, _ in points)
    assert max(counts.values()) == 1, counts.most_common(3)
    return {(name, step): value for name, step, value in points}


def read_logged(folder):
    """Return (name, step) -> value of the run's own logs."""
    return {
        (f"{step}/{tag}".replace("@", "-at-"), line["step"]): line[tag]
        for step in ("cf", "stage1", "stage2")
        for line in map(json.loads, (folder / step / "metrics.jsonl").read_text().splitlines())
        for tag in line
        if tag != "step"
    }


def without_report(points):
    return {place: value for place, value in points.items() if not place[0].startswith("report/")}


def test_settings_curves_and_report_are_there(client, track):
    folder = track("one")
    found = find_run(client, folder)
    assert (found.info.run_name, found.info.status) == ("one", "FINISHED")
    assert found.data.params["lora.rank"] == "2"
    assert found.data.params["prompt.stage1"].startswith("Liked: <ItemTitleList>")
    assert found.data.params["dataset.path"] == "ratings.csv"
    sent = read_sent(client, found.info.run_id)
    assert without_report(sent) == read_logged(folder)
    assert {name.partition("/")[0] for name, _ in sent} == {"cf", "stage1", "stage2", "report"}
    report = json.loads((folder / "eval" / "report.json").read_text())
    for row in report["rows"]:
        if row["slice"] == "all":
            assert sent[f"report/{row['split']}/{row['model']}/auc", 1] == row["auc"]
    assert ("report/test/stage2-less-cf/auc_low", 1) in sent
    files = {file.path for file in client.list_artifacts(found.info.run_id, "report")}
    assert {"report/report.md", "report/report.json", "report/auc-test.png"} <= files
    assert [file.path for file in client.list_artifacts(found.info.run_id) if not file.is_dir] == ["config.yaml"]
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    track("one")  # again: nothing new
    assert find_run(client, folder).info.run_id == found.info.run_id
    assert read_sent(client, found.info.run_id) == sent


def test_the_alias_follows_promotions(client, track):
    rule = ("promotion.baseline=cf", "monitoring.mlflow.registered_model=films")

    def run(name, at_least):
        return track(name, *rule, f"promotion.min_paired_difference={at_least}", act=promote)

    first = run("one", -1)
    (version,) = client.search_model_versions("name='films'")
    assert version.run_id == find_run(client, first).info.run_id
    assert version.tags["run.dir"] == str(first)
    assert version.tags["content_hash"] == json.loads((first / "stage2" / "summary.json").read_text())["content_hash"]
    assert client.get_model_version_by_alias("films", "production").version == "1"
    run("two", 1)
    rejected = client.get_model_version("films", "2")
    assert rejected.tags["promotion"] == "rejected"
    assert "its lower end is not at least" in rejected.tags["reason"]
    assert client.get_model_version_by_alias("films", "production").version == "1"
    run("two", -1)  # the same model, judged by another rule
    assert client.get_model_version("films", "2").tags["promotion"] == "promoted"
    assert client.get_model_version_by_alias("films", "production").version == "2"
    run("one", -1)  # decided before, and no longer in use: nothing moves back
    assert client.get_model_version_by_alias("films", "production").version == "2"
    assert len(client.search_model_versions("name='films'")) == 2


def test_the_pipeline_tracks_its_run_and_its_steps_do_not(client, server, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    folder = tmp_path / "run"
    arguments = [f"monitoring.mlflow.tracking_uri={server.uri}", "monitoring.mlflow.registered_model=piped",
                 "promotion.min_paired_difference=-1", "promotion.baseline=cf", "--force", "eval"]  # fmt: skip
    output, _ = (process := launch("run_pipeline", folder, *arguments)).communicate(timeout=600)
    assert process.returncode == 0, output
    assert WARNING not in output
    assert SECRET not in output
    found = find_run(client, folder)
    assert found.info.status == "FINISHED"
    assert without_report(read_sent(client, found.info.run_id)) == read_logged(folder)
    assert client.get_model_version_by_alias("piped", "production").run_id == found.info.run_id
    experiment = client.get_experiment_by_name("collm-dist").experiment_id
    runs = client.search_runs([experiment], "tags.`mlflow.runName` = 'run'")
    assert [run.info.run_id for run in runs] == [found.info.run_id]


def test_a_killed_training_goes_on_in_its_mlflow_run(client, server, finished_run, tmp_path):
    """Points after the last checkpoint were sent before the kill. They are trained again, and keep their values."""
    shutil.copytree(finished_run, tmp_path / "run")
    folder = tmp_path / "run"
    checkpoints = folder / "stage1" / "checkpoints"
    settings = ["--stage", "1", f"monitoring.mlflow.tracking_uri={server.uri}", "stage1.max_steps=9000",
                "stage1.checkpoint_every_steps=100", "stage1.eval_every_steps=9000", "stage1.num_epochs=9000",
                "stage1.learning_rate=1e-4"]  # fmt: skip
    process = launch("train", folder, *settings, "--force", "stage1")
    deadline = time.monotonic() + 500
    while True:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
        if not (folder / "mlflow.json").exists():
            continue
        try:
            found = find_run(client, folder)
        except ValueError:  # not made yet
            continue
        saved = max(
            (int(path.stem.removeprefix("step-")) for path in checkpoints.glob("step-*.safetensors")), default=9000
        )
        steps = [point.step for point in client.get_metric_history(found.info.run_id, "stage1/train/loss")]
        if max(steps, default=0) > saved + 5:  # sent, and trained again after the kill
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = read_sent(client, found.info.run_id)
    # Of the file, which may be ahead of what was sent: a later step can only be the resumed training's.
    last = max(step for name, step in read_logged(folder) if name == "stage1/train/loss")
    assert find_run(client, folder).info.status == "RUNNING"
    resumed = launch("train", folder, *settings)
    while resumed.poll() is None and f'"step": {last + 20},' not in (folder / "stage1" / "metrics.jsonl").read_text():
        time.sleep(0.2)
    resumed.send_signal(signal.SIGTERM)
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 75, output
    again = find_run(client, folder)
    assert (again.info.run_id, again.info.status) == (found.info.run_id, "KILLED")
    sent, logged = read_sent(client, found.info.run_id), read_logged(folder)
    assert {place: sent[place] for place in before} == before
    stage1 = {place: value for place, value in sent.items() if place[0].startswith("stage1/")}
    logged = {place: value for place, value in logged.items() if place[0].startswith("stage1/")}
    assert stage1.keys() == logged.keys()
    for (name, step), value in logged.items():  # speeds differ between the two attempts
        if "/train/" in name or "/valid/" in name:
            assert stage1[name, step] == value
    assert any(before[place] != logged[place] for place in before if place in logged), "no point was trained twice"


def test_a_new_report_adds_a_point_and_a_forced_training_is_a_new_run(client, track):
    folder = track("run")
    found = find_run(client, folder)

    def evaluate_again(config, run_dir):
        record = run_dir.read_record("eval")
        run_dir.write_record("eval", record | {"content_hash": "another"})

    track("run", force=("eval",), act=evaluate_again)
    assert find_run(client, folder).info.run_id == found.info.run_id
    steps = {step for name, step in read_sent(client, found.info.run_id) if name == "report/test/stage2/auc"}
    assert steps == {1, 2}

    def train_again(config, run_dir):
        time.sleep(6)  # a look at the old files
        path = run_dir.step_dir("stage2") / "metrics.jsonl"
        lines = [json.dumps({"step": step, "train/loss": float(step)}) + "\n" for step in (1, 2)]
        path.unlink()
        path.write_text("".join(lines))

    track("run", force=("stage2",), act=train_again)
    forced = find_run(client, folder)
    assert forced.info.run_id != found.info.run_id
    sent = read_sent(client, forced.info.run_id)
    assert sent == read_logged(folder)  # no report: the old one is of another training
    assert sent["stage2/train/loss", 2] == 2.0


TRACKING = """
import sys, time
from collm_dist.config.loader import load_config
from collm_dist.monitoring import track_run
from collm_dist.runs.run_dir import RunDir
from pathlib import Path
folder = Path(sys.argv[1])
config = load_config(folder / "config.yaml", [f"run.dir={folder}", f"monitoring.mlflow.tracking_uri={sys.argv[2]}"])
started = time.monotonic()
with track_run(config, RunDir(folder), (), is_owner=True):
    time.sleep(1)
print(time.monotonic() - started)
"""


def test_a_server_that_hangs_costs_seconds_and_gets_everything_later(server, client, finished_run, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")

    def run():
        command = [sys.executable, "-c", TRACKING, str(folder), server.uri]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return float(done.stdout), done.stderr

    with server.hanging():
        seconds, errors = run()
    assert seconds < 18
    assert errors.count(WARNING) == 1
    assert WARNING not in run()[1]
    sent = read_sent(client, find_run(client, folder).info.run_id)
    assert without_report(sent) == read_logged(folder)
    assert ("report/test/stage2/auc", 1) in sent


def test_without_a_server_the_block_ends_as_usual(track, caplog):
    started = time.monotonic()
    track("run", uri="http://127.0.0.1:9")
    assert time.monotonic() - started < 20
    assert caplog.text.count(WARNING) == 1
    with pytest.raises(ZeroDivisionError):
        track("run", uri="http://127.0.0.1:9", act=lambda config, run_dir: 1 / 0)
