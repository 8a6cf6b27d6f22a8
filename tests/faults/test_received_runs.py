"""Runs and exports from someone else, in which any file may be hostile, and what leaves this machine."""

import json
import os
import shutil
from argparse import Namespace
from contextlib import suppress

import pytest

from collm_dist import RankingRequest, load_recommender
from collm_dist.commands import evaluate_model
from collm_dist.config.loader import change_settings, dump_config, load_config
from collm_dist.data.accepted_config import accept_config
from collm_dist.errors import ArtifactError, DiskError
from collm_dist.orchestration.leaderboard import run_once
from collm_dist.runs.atomic_files import compute_file_hash
from collm_dist.runs.local_paths import check_links
from collm_dist.runs.publish import build_publisher
from collm_dist.runs.reuse import link_step
from collm_dist.runs.run_dir import STEPS, RunDir
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.licences import Licences
from tests.faults.conftest import relocate
from tests.golden.make_run import ASSET
from tests.integration.byte_search import find_text

LICENCES = Licences("a", "b", "c")


@pytest.fixture
def run(finished, tmp_path):
    """A finished run with absolute paths in settings and records, which must not leave this machine."""
    return relocate(finished, tmp_path / "secret-place", {"run.publish_to": str(tmp_path / "published")})


def publish(run):
    publisher = build_publisher(load_config(run.path / "config.yaml"), run)
    publisher.publish_file("config.yaml")
    for step in STEPS[:-1]:
        publisher.publish_step(step)
    return run.path.parent.parent / "published" / "run"


def score(folder):
    recommender = load_recommender(folder, "cpu")
    items = recommender.item_ids
    return recommender.score([RankingRequest(None, items[:3], items)])[0].tolist()


def test_a_published_run_has_no_paths_of_the_machine_and_gives_the_same_scores(run, capsys):
    stage1 = run.step_dir("stage1")
    (stage1 / "stacks-rank0.txt").write_text(f'File "{run.path.parent}/x.py", line 1')
    (stage1 / "deepspeed_config.json").write_text(json.dumps({"nvme_path": f"{run.path.parent}/ratings.csv"}))
    card = stage1 / "adapter" / "README.md"
    card.write_text(card.read_text() + f"\nbase_model:adapter:{run.path.parent}/backbone\n")
    record = run.read_record("stage1")
    run.write_record("stage1", record | {"files": record["files"] | {"adapter/README.md": compute_file_hash(card)}})
    published = publish(run)
    assert find_text(run.path, "secret-place")
    assert find_text(published, "secret-place") == []
    assert not (published / "stage1" / "stacks-rank0.txt").exists()
    assert score(published) == score(run.path)
    capsys.readouterr()
    publish(run)
    assert capsys.readouterr().out.count("published already") == 4


@pytest.mark.parametrize("name", ["stage1/merged/model.safetensors", "cf/model.safetensors", "stage2/summary.json"])
def test_publishing_again_heals_what_was_damaged_there(run, name):
    published = publish(run)
    data = bytearray((published / name).read_bytes())
    data[-3] ^= 1
    (published / name).write_bytes(data)
    publish(run)
    assert score(published) == score(run.path)


def test_publishing_again_does_not_write_through_a_link(run, tmp_path):
    published = publish(run)
    (published / "cf" / "model.safetensors").unlink()
    (published / "cf" / "model.safetensors").symlink_to(tmp_path / "planted")
    publish(run)
    assert not (tmp_path / "planted").exists()
    assert score(published) == score(run.path)


@pytest.mark.parametrize("place", ["stage1/adapter/key", "stage1/adapter", "stage1/merged/more/key", "cf/key"])
def test_files_that_a_link_leads_to_do_not_leave_the_machine(run, tmp_path, place):
    secret = tmp_path / "home" / "key"
    secret.parent.mkdir()
    secret.write_text("private")
    path = run.path / place
    if path.is_dir():
        shutil.copytree(path, secret.parent, dirs_exist_ok=True)
        shutil.rmtree(path)
        path.symlink_to(secret.parent)
    else:
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(secret)
    with pytest.raises(ArtifactError, match=r"is a link to .*/home"):
        publish(run)
    if place.startswith("stage1"):
        with pytest.raises(ArtifactError, match=r"is a link to .*/home"):
            export_model(load_config(run.path / "config.yaml"), run, tmp_path / "export", LICENCES)
    assert find_text(tmp_path / "published", "private") == []


def test_parts_of_another_run_leave_the_machine(run, tmp_path):
    other = tmp_path / "other" / "stage1"
    other.parent.mkdir()
    (run.path / "stage1" / "merged").rename(shutil.copytree(run.path / "stage1", other) / "moved")
    (run.path / "stage1" / "merged").symlink_to(other / "merged")
    expected = score(run.path)
    assert score(publish(run)) == expected
    export = export_model(load_config(run.path / "config.yaml"), run, tmp_path / "export", LICENCES)
    assert score(import_model(export, RunDir(tmp_path / "imported")).path) == expected


@pytest.mark.parametrize(
    "place", ["metrics.jsonl", "stage1/metrics.jsonl", "stage1/tensorboard", "cf", "x/checkpoints"]
)
def test_training_and_searches_change_nothing_that_a_link_leads_to(tmp_path, place):
    for name in ("away", "run/stage1", "run/x", "other/stage1"):
        (tmp_path / name).mkdir(parents=True)
    config = change_settings(load_config(ASSET / "run" / "config.yaml"), {"run.dir": str(tmp_path / "run")})
    run = RunDir(tmp_path / "run")
    (run.path / "stage1" / "adapter").symlink_to(tmp_path / "other" / "stage1" / "adapter")
    (run.path / "stage1" / "checkpoints").symlink_to(tmp_path / "away")  # on another disk
    (run.path / "data").symlink_to("../other/data")
    (run.path / "circle").symlink_to("circle")
    accept_config(config, run)
    path = run.path / place
    path.symlink_to(tmp_path / "away" / "notes")
    (run.path / "config.yaml").unlink()
    for work in (
        lambda: accept_config(config, run),
        lambda: evaluate_model._run(config, Namespace(force=())),
        lambda: run_once(run.path / "cf_search", run.path, "cf", {}, print, dict),
    ):
        with pytest.raises(ArtifactError, match=rf"{path} is a link to .*/away/notes, and work here would change that"):
            work()
    assert not (run.path / "config.yaml").exists()
    assert not (run.path / "cf_search").exists()


@pytest.mark.parametrize("place", ["anchor", "data/shards/train", "stage1/adapter/key"])
def test_links_that_no_run_makes_are_refused(tmp_path, place):
    """They lead to the same part of another run, but nothing removes them before that part is written."""
    (tmp_path / "other" / place).mkdir(parents=True)
    path = tmp_path / "run" / place
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "other" / place)
    with pytest.raises(ArtifactError, match=f"{path} is a link to"):
        check_links(tmp_path / "run")


def test_a_search_that_was_interrupted_goes_on_in_a_run_that_reuses_steps(tmp_path):
    origin, run = RunDir(tmp_path / "origin"), RunDir(tmp_path / "run")
    origin.step_dir("data").mkdir(parents=True)
    link_step("data", origin, run)
    trial = RunDir(run.path / "stage1_search" / "trials" / "000" / "run")
    link_step("data", run, trial)
    assert trial.step_dir("data").resolve() == origin.step_dir("data")
    check_links(run.path)
    check_links(trial.path)


@pytest.mark.parametrize(
    ("place", "end"),
    [
        ("data", "cf"),
        ("stage1/checkpoints", "away"),
        ("stage1/adapter/key", "stage1/adapter/key"),
        ("anchor", "anchor"),
    ],
)
def test_links_of_trials_that_no_search_makes_are_refused(tmp_path, place, end):
    target = tmp_path / "other" / end
    target.mkdir(parents=True)
    path = tmp_path / "run" / "stage1_search" / "trials" / "000" / "run" / place
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    with pytest.raises(ArtifactError, match=f"{path} is a link to"):
        check_links(tmp_path / "run")


@pytest.fixture
def export(run, tmp_path):
    return export_model(load_config(run.path / "config.yaml"), run, tmp_path / "export", LICENCES)


def index(export, **changes):
    """Change the index of an export: file names and hashes."""
    record = json.loads((export / "export.json").read_text())
    record["files"] |= changes
    (export / "export.json").write_text(json.dumps(record))


def refuse(export, tmp_path, match, error=ArtifactError):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        import_model(export, RunDir(tmp_path / "imported"))
    assert caught.value.exit_code in (2, 3)
    assert sorted(tmp_path.rglob("*")) == before


def test_names_and_links_that_lead_out_of_an_export(export, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "key").write_text("private")
    sha256 = compute_file_hash(outside / "key")
    names = [str(outside / "key"), "../outside/key", "data/../../outside/key", "cf//../../outside/key", "data", "", "."]
    for name in names:
        copy = shutil.copytree(export, tmp_path / "copy")
        index(copy, **{name: sha256})
        refuse(copy, tmp_path, "outside the export|is missing, or a link")
        shutil.rmtree(copy)
    for place, target in (("data/linked", outside / "key"), ("data/more", outside)):
        copy = shutil.copytree(export, tmp_path / "copy")
        (copy / place).symlink_to(target)
        index(copy, **{place if target != outside else f"{place}/key": sha256})
        refuse(copy, tmp_path, "is missing, or a link")
        shutil.rmtree(copy)
    os.mkfifo(export / "data" / "pipe")
    index(export, **{"data/pipe": sha256})
    refuse(export, tmp_path, "is missing, or a link")


def test_a_hard_link_in_an_export_becomes_a_file(export, tmp_path):
    (export / "data" / "hard").hardlink_to(export / "data" / "items.parquet")
    index(export, **{"data/hard": compute_file_hash(export / "data" / "hard")})
    imported = import_model(export, RunDir(tmp_path / "imported"))
    assert all(path.stat().st_nlink == 1 for path in imported.path.rglob("*") if path.is_file())


def test_a_file_and_a_folder_of_one_name(export, tmp_path):
    (export / "cf" / "a").mkdir()
    (export / "cf" / "a" / "b").touch()
    index(export, **{"cf/a/b": compute_file_hash(export / "cf" / "a" / "b"), "cf/a": "0"})
    refuse(export, tmp_path, "is missing, or a link")


def test_sizes_that_no_disk_holds_are_refused_before_they_are_read(export, tmp_path):
    with (export / "data" / "sparse").open("wb") as file:
        file.truncate(8 << 40)
    index(export, **{"data/sparse": "0"})
    refuse(export, tmp_path, r"the export has 8,388,60\d\.\d MiB, but .* free", DiskError)
    with (export / "export.json").open("r+b") as file:
        file.truncate(1 << 40)
    refuse(export, tmp_path, r"export\.json has more than 64 MiB")


def test_settings_of_a_received_run_say_nothing_about_this_machine(export, tmp_path):
    config = change_settings(
        load_config(export / "config.yaml"),
        {"run.publish_to": "s3://theirs", "run.reuse": ["/other"], "promotion.pointer": "/theirs/pointer",
         "monitoring.mlflow.tracking_uri": "http://theirs",
         "monitoring.prometheus_dir": "/theirs/metrics", "cluster.local_scratch": "/theirs/scratch"},
    )  # fmt: skip
    (export / "config.yaml").write_text(dump_config(config))
    index(export, **{"config.yaml": compute_file_hash(export / "config.yaml")})
    imported = load_config(import_model(export, RunDir(tmp_path / "imported")).path / "config.yaml")
    assert (imported.run.publish_to, imported.run.reuse, imported.promotion.pointer) == (None, (), None)
    assert (imported.monitoring.prometheus_dir, imported.cluster.local_scratch) == (None, None)
    assert imported.monitoring.mlflow.tracking_uri is None


def test_settings_of_a_received_run_read_no_other_file(run, export, tmp_path):
    (tmp_path / "private.yaml").write_text("password: x")
    for path in (run.path / "config.yaml", export / "config.yaml"):
        path.write_text(f"base: {tmp_path / 'private.yaml'}\n" + path.read_text())
    index(export, **{"config.yaml": compute_file_hash(export / "config.yaml")})
    refuse(export, tmp_path, "base: a run's settings are complete")
    with pytest.raises(ArtifactError, match="base: a run's settings are complete"):
        load_recommender(run.path, "cpu")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "auto_map", {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["foreign.Tokenizer", None]}),
        ("config.json", "_attn_implementation", "theirs/kernel"),
        ("config.json", "attn_implementation", "theirs/kernel"),
    ],
)
def test_files_of_a_backbone_choose_no_code(run, tmp_path, monkeypatch, file, key, value):
    """Even if the hashes in the record are those of the files."""
    merged = run.step_dir("stage1") / "merged"
    (merged / "foreign.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(merged))
    expected = score(run.path)
    (merged / file).write_text(json.dumps(json.loads((merged / file).read_text()) | {key: value}))
    record = run.read_record("stage1")
    files = {name: compute_file_hash(run.step_dir("stage1") / name) for name in record["files"]}
    run.write_record("stage1", record | {"files": files})
    with suppress(ArtifactError):
        assert score(run.path) == expected
    assert not (tmp_path / "marker").exists()


def test_pickled_weights_are_not_read(run):
    merged = run.step_dir("stage1") / "merged"
    (merged / "model.safetensors").rename(merged / "pytorch_model.bin")
    record = run.read_record("stage1")
    run.write_record("stage1", {key: value for key, value in record.items() if key != "files"})
    with pytest.raises(ArtifactError, match=r"merged is damaged or missing .*safetensors"):
        load_recommender(run.path, "cpu")
