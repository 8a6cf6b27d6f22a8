"""Logs in a real object store, steps published there, and messages when it cannot be reached."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from collm_dist.errors import DataError, LaunchError
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.runs import publish
from collm_dist.runs.publish import Publisher, list_step_files
from collm_dist.runs.run_dir import RunDir
from collm_dist.storage import join_uri, list_files
from tests.integration.object_store import serve_object_store
from tests.integration.preprocess_runs import make_config, preprocess, ratings_of

STEPS = ("data", "cf", "stage1", "stage2", "eval")


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_ratings):
    """A store that holds the tiny ratings, in one file and in two; its keys are in the environment."""
    with serve_object_store(tmp_path_factory.mktemp("store")) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        folder = store.root / "bucket" / "logs"
        (folder / "parts").mkdir(parents=True)
        for name in ("ratings.csv", "items.csv"):
            shutil.copy(tiny_ratings / name, folder)
        header, *lines = (tiny_ratings / "ratings.csv").read_text().splitlines(keepends=True)
        (folder / "parts" / "part-0.csv").write_text(header + "".join(lines[:700]))
        (folder / "parts" / "part-1.csv").write_text(header + "".join(lines[700:]))
        yield store


@pytest.fixture
def _ray(store):
    """Workers have the environment of the process that starts Ray: the keys must be there before."""
    with connect_ray(make_config({"path": "unused", "columns": {"label": "label"}}, "unused").cluster):
        yield


@pytest.mark.usefixtures("_ray")
def test_a_log_in_a_store_is_the_log(store, tmp_path, tiny_ratings):
    """As a file, by a glob, and as a folder whose URI says where the store is."""
    local = preprocess(make_config(ratings_of(tiny_ratings), tmp_path / "local"))
    options = f"?endpoint_override={store.endpoint.removeprefix('http://')}&scheme=http"
    for number, path in enumerate(("logs/ratings.csv", "logs/parts/part-*.csv", f"logs/parts{options}")):
        dataset = ratings_of(tiny_ratings) | {"path": f"s3://bucket/{path}", "items_path": "s3://bucket/logs/items.csv"}
        remote = preprocess(make_config(dataset, tmp_path / str(number)))
        assert remote["content_hash"] == local["content_hash"]
    assert list_files(f"s3://bucket/logs/parts{options}", "dataset.path") == [
        f"s3://bucket/logs/parts/part-{number}.csv{options}" for number in (0, 1)
    ]


def run_preprocess_command(repository, folder, path, **environment):
    command = [sys.executable, "launch/preprocess_data.py", "--config", "configs/tiny_cpu.yaml", f"run.dir={folder}"]
    command += [f"dataset.path={path}", "dataset.items_path=null"]
    return subprocess.run(
        command, cwd=repository, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "NETWORK_CONNECTION.*(.|\n)*check that the store is up"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "ACCESS_DENIED.*(.|\n)*set credentials"),
    ],
)
def test_a_store_that_cannot_be_had_is_named_with_a_remedy(store, tmp_path, monkeypatch, variable, value, message):
    """In this process: what a command makes of a LaunchError is tested with it."""
    assert LaunchError.exit_code == 3
    monkeypatch.setenv(variable, value)
    with pytest.raises(LaunchError, match=message):
        preprocess(make_config({"path": "s3://bucket/logs", "columns": {"rating": "rating"}}, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_command_ends_with_code_three_and_nothing_written(store, tmp_path, repository):
    done = run_preprocess_command(
        repository, tmp_path / "run", "s3://bucket/logs/ratings.csv", AWS_ENDPOINT_URL="http://127.0.0.1:9"
    )
    assert done.returncode == 3, done.stderr
    assert "LaunchError: dataset.path: 's3://bucket/logs/ratings.csv' cannot be listed" in done.stderr
    assert "check that the store is up" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("*/*"))


def test_what_is_wrong_with_a_uri_is_said(store):
    for uri, message in (
        ("s3://bucket/absent", "there is no file or folder"),
        ("s3://bucket/logs?colour=red", "Unexpected query parameter"),
        ("s5://bucket/logs", "cannot be opened"),
    ):
        with pytest.raises(DataError, match=message):
            list_files(uri, "dataset.path")


def read_published(store, name):
    """Return what a store's folder holds, by name: bytes."""
    folder = store.root / "bucket" / name
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_finished_steps_are_published_whole(store, finished_run, capsys):
    publisher = Publisher("s3://bucket/whole", RunDir(finished_run), show_progress=False)
    publisher.publish_file("config.yaml")
    for step in STEPS:
        publisher.publish_step(step)
    found = read_published(store, "whole")
    expected = {
        f"{step}/{name}": path.read_bytes()
        for step in STEPS
        for name, path in list_step_files(finished_run / step).items()
    }
    expected["config.yaml"] = (finished_run / "config.yaml").read_bytes()
    indices = {name for name in found if name.endswith(publish.INDEX)}
    assert {name: data for name, data in found.items() if name not in indices} == expected
    assert indices == {f"{step}/{publish.INDEX}" for step in STEPS}
    assert not any("checkpoints" in name or "/." in name for name in found)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (store.root / "bucket" / "whole").rglob("*")}
    for step in STEPS:
        publisher.publish_step(step)
    assert capsys.readouterr().out.count("published already") == len(STEPS)
    assert before == {path: path.stat().st_mtime_ns for path in (store.root / "bucket" / "whole").rglob("*")}


@pytest.mark.parametrize("where", ["store", "folder"])
def test_a_publication_that_was_stopped_goes_on(store, finished_run, tmp_path, monkeypatch, capsys, where):
    """Stopped at any file: no record is there; the next time only what is missing or damaged is sent."""
    uri = "s3://bucket/stopped" if where == "store" else str(tmp_path / "stopped")
    folder = store.root / "bucket" / "stopped" if where == "store" else tmp_path / "stopped"
    publisher = Publisher(uri, RunDir(finished_run), show_progress=False)
    plain, sent = Publisher._send, []

    def stop_after_three(self, name, *rest):
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(name)
        plain(self, name, *rest)

    monkeypatch.setattr(Publisher, "_send", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        publisher.publish_step("data")
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 3
    assert not (folder / "data" / "manifest.json").exists()
    monkeypatch.setattr(Publisher, "_send", lambda self, name, *rest: sent.append(name) or plain(self, name, *rest))
    damaged = folder / sent[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")  # of the same size
    publisher.publish_step("data")
    again = sent[3:]
    assert again[0] == sent[0]
    assert not {sent[1], sent[2]} & set(again)
    assert again[-1] == "data/manifest.json"
    names = list_step_files(finished_run / "data")
    assert {name: (folder / "data" / name).read_bytes() for name in names} == {
        name: path.read_bytes() for name, path in names.items()
    }
    assert f"published {len(names)} files" in capsys.readouterr().out


def test_another_step_of_that_name_is_replaced_and_what_follows_it_withdrawn(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    publisher = Publisher(str(tmp_path / "there"), RunDir(run), show_progress=False)
    for step in ("data", "cf"):
        publisher.publish_step(step)
    shard = next((run / "data" / "shards").glob("test-*"))
    shard.rename(shard.with_name("test-00099.tar"))
    record = RunDir(run).read_record("data") | {"changed": True}
    (info,) = (info for info in record["shards"] if info["path"] == f"shards/{shard.name}")
    info["path"] = "shards/test-00099.tar"
    RunDir(run).write_record("data", record)
    publisher.publish_step("data")
    there = tmp_path / "there"
    assert not (there / "cf" / "summary.json").exists()
    assert not (there / "data" / "shards" / shard.name).exists()
    assert (there / "data" / "shards" / "test-00099.tar").exists()
    assert json.loads((there / "data" / "manifest.json").read_text())["changed"]
    publisher.publish_step("cf")
    assert (there / "cf" / "summary.json").exists()


def test_joined_uris_keep_their_options():
    assert join_uri("s3://b/k/?scheme=http", "run", "data") == "s3://b/k/run/data?scheme=http"
    assert join_uri("there/", "run") == "there/run"
