"""Exports and publications: no paths of the machine that made them, and no way to write elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from collm_dist import RankingRequest, load_recommender
from collm_dist.config.loader import change_settings, load_config
from collm_dist.errors import ArtifactError, ConfigError
from collm_dist.runs.file_hashes import check_files
from collm_dist.runs.local_paths import PathRemover
from collm_dist.runs.promotion import find_pointer
from collm_dist.runs.publish import build_publisher
from collm_dist.runs.run_dir import STAGES, RunDir
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.licences import Licences
from tests.conftest import REPOSITORY
from tests.faults.conftest import relocate
from tests.integration.byte_search import find_text

LICENCES = Licences("a", "b", "c")


@pytest.fixture
def run(finished, tmp_path):
    """A finished run whose settings and records have absolute paths."""
    folder = tmp_path / "secret-place"
    run = relocate(finished, folder, {"run.reuse": [str(folder / "other")]})
    record = run.read_record("data")
    record["fingerprint"] |= {
        f"input.{folder}/ratings.csv": {"size": 1},
        "config.dataset.path": f"{folder}/ratings.csv",
    }
    run.write_record("data", record)
    return run


def test_an_export_has_no_paths_of_the_machine_and_gives_the_same_scores(run, tmp_path):
    card = run.step_dir("stage1") / "adapter" / "README.md"
    card.write_text(card.read_text() + f"\nbase_model:adapter:{run.path.parent}/backbone\n")
    record = run.read_record("stage1")
    del record["files"]["adapter/README.md"]
    run.write_record("stage1", record)
    export = export_model(load_config(run.path / "config.yaml"), run, tmp_path / "export", LICENCES)
    assert find_text(run.path, "secret-place")
    assert find_text(export, "secret-place") == []
    config = load_config(export / "config.yaml")
    assert (config.llm.backbone, config.dataset.path, config.run.reuse) == ("backbone", "ratings.csv", ("other",))
    assert "input.ratings.csv" in json.loads((export / "records" / "data.json").read_text())["fingerprint"]
    imported = import_model(export, RunDir(tmp_path / "imported"))
    for stage in STAGES:
        check_files(imported, stage)
    ours, theirs = load_recommender(run.path, "cpu"), load_recommender(imported.path, "cpu")
    requests = [RankingRequest(None, ours.item_ids[:3], ours.item_ids)]
    assert ours.score(requests)[0].tolist() == theirs.score(requests)[0].tolist()


def test_paths_within_other_words_stay(run):
    config = change_settings(load_config(run.path / "config.yaml"), {"dataset.path": "/data"})
    remover = PathRemover(config, run)
    assert remover.clean_text("s3://bucket/data s3://data x/data /data /data/a.csv /database") == (
        "s3://bucket/data s3://data x/data data data/a.csv /database"
    )
    assert remover.clean({"input./a/x": 1, "input./b/x": 2, "n": ["/b/y", "/ or <UserID>", None]}) == {
        "input.x": 1,
        "input.x'": 2,
        "n": ["y", "/ or <UserID>", None],
    }


def test_leftovers_and_planted_links(run, tmp_path):
    config, target = load_config(run.path / "config.yaml"), tmp_path / "mine"
    target.mkdir()
    (target / "file").touch()
    (tmp_path / ".export.part").symlink_to(target)
    (tmp_path / ".export.abc.part").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    export_model(config, run, tmp_path / "export", LICENCES)
    assert [path.name for path in target.iterdir()] == ["file"]
    assert not (tmp_path / ".export.abc.part").exists()
    assert not (tmp_path / "export").stat().st_mode & 0o077 ^ (tmp_path / "mine").stat().st_mode & 0o077
    with pytest.raises(ArtifactError, match="exists already"):
        export_model(config, run, tmp_path / "dangling", LICENCES)
    with pytest.raises(ArtifactError, match="is missing"):
        import_model(tmp_path / "mine", RunDir(tmp_path / "imported"))
    flipped = tmp_path / "export" / "mapping.safetensors"
    flipped.write_bytes(b"")
    with pytest.raises(ArtifactError):
        import_model(tmp_path / "export", RunDir(tmp_path / "imported"))
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".export.part"]


def test_a_run_dir_with_dots_publishes_below_the_destination(run, tmp_path, monkeypatch):
    (run.path / "below").mkdir()
    monkeypatch.chdir(run.path / "below")
    config = change_settings(
        load_config(run.path / "config.yaml"), {"run.dir": "..", "run.publish_to": str(tmp_path / "published")}
    )
    publisher = build_publisher(config, RunDir(Path("..")))
    assert publisher.uri == str(tmp_path / "published" / "run")
    publisher.publish_step("stage2")
    assert (tmp_path / "published" / "run" / "stage2" / "summary.json").exists()
    assert find_pointer(config) == run.path.parent / "current"
    inside = change_settings(config, {"run.publish_to": "../../run/x"})
    with pytest.raises(ConfigError, match=r"lies in run\.dir"):
        build_publisher(inside, RunDir(Path("..")))


def test_the_folder_that_one_is_in(run, tmp_path):
    (tmp_path / "here").mkdir()
    command = [sys.executable, REPOSITORY / "launch/import_model.py", "--input", tmp_path, "--run-dir", "."]
    done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
