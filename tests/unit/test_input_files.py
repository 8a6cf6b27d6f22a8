"""Identity of input files: content, whatever their time."""

import os
import shutil

import pytest

from collm_dist.config.loader import load_config
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import ArtifactError, DataError
from collm_dist.runs.fingerprints import find_changes, is_step_current
from collm_dist.runs.input_files import (
    describe_file,
    describe_inputs,
    drop_times,
    is_same_input,
    keep_old_entries,
)
from collm_dist.runs.run_dir import RunDir
from collm_dist.storage import describe_files
from tests.golden.make_run import ASSET, set_input_times


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COLLM_CACHE", str(tmp_path / "cache"))


def test_a_copy_is_the_same_file_and_a_change_is_not(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    first = describe_file(path)
    assert describe_file(path) == first  # from the cache
    os.utime(path, (1, 1))
    again = describe_file(path)
    assert again != first
    assert is_same_input(first, again)
    assert find_changes({"input.a": first}, {"input.a": again}) == []
    assert drop_times({"input.a": first, "b": 1}) == {"input.a": first["sha256"], "b": 1}
    path.write_text("two")
    os.utime(path, (1, 1))
    other = describe_file(path)
    assert not is_same_input(first, other) or other["size"] == again["size"]
    path.write_text("three")
    assert len(find_changes({"input.a": first}, {"input.a": describe_file(path)})) == 1
    with pytest.raises(DataError, match="cannot be read"):
        describe_file(tmp_path / "none")


@pytest.mark.parametrize("text", ["{", "[]", '{"size": 3, "mtime_ns": 1000000000, "sha256": 5}', "\x00"])
def test_a_damaged_cache_is_not_used(tmp_path, text):
    path = tmp_path / "a"
    path.write_text("one")
    whole = describe_file(path)
    (entry,) = (tmp_path / "cache" / "file-hashes").iterdir()
    entry.write_text(text)
    assert describe_file(path) == whole


def test_entries_of_0_1(tmp_path):
    (tmp_path / "a").write_text("one")
    new = describe_file(tmp_path / "a")
    old = [new["size"], new["mtime_ns"]]
    assert is_same_input(old, new)
    assert is_same_input(new, old)
    assert not is_same_input([new["size"], 5], new)
    assert keep_old_entries({"a": new}, {"input.a": old}) == {"a": old}
    assert keep_old_entries({"a": new}, {"input.a": [1, 2]}) == {"a": new}
    assert keep_old_entries({"a": new}, {}) == {"a": new}


def test_a_backbone_that_was_copied_again_resumes(tmp_path, monkeypatch):
    folder = shutil.copytree(ASSET, tmp_path / "copy")
    monkeypatch.chdir(folder)
    set_input_times(folder)
    run = RunDir(folder / "run")
    config = load_config(run.path / "config.yaml")
    record = run.read_record("stage1")
    run.record_path("stage1").unlink()
    fingerprint = compute_step_fingerprint(config, run, "stage1")
    assert find_changes(record["fingerprint"], fingerprint) == []  # of 0.1: by size and time
    run.write_record("stage1", record | {"fingerprint": fingerprint})
    for path in (folder / "backbone").iterdir():
        os.utime(path)
    assert is_step_current(run, "stage1", compute_step_fingerprint(config, run, "stage1"))
    path = folder / "backbone" / "generation_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ArtifactError, match=r"input\.backbone\.generation_config\.json"):
        is_step_current(run, "stage1", compute_step_fingerprint(config, run, "stage1"))


def describe(uri, recorded=None):
    return describe_inputs(describe_files([uri]), recorded or {})[uri]


def test_a_raw_file_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr("collm_dist.runs.input_files._BLOCK_BYTES", 4)
    path = tmp_path / "log.csv"
    path.write_text("ten bytes!")
    first = describe(str(path))
    os.utime(path, (1, 1))
    again = describe(f"file://{path}")
    assert first["mtime_ns"] != again["mtime_ns"]
    assert is_same_input(first, again)
    for text in ("ten bytes?", "bytes ten!", "ten bytes!ten bytes!", "ten "):  # any block
        path.write_text(text)
        assert not is_same_input(first, describe(str(path)))
    path.write_text("")
    assert is_same_input(describe(str(path)), describe(str(path)))


def test_a_raw_file_is_read_only_if_it_is_not_known(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    path.write_text("text")
    states = describe_files([str(path)])
    monkeypatch.setattr("collm_dist.runs.input_files._hash_blocks", None)
    old = {f"input.{path}": states[str(path)]}  # an entry without a hash
    assert describe_inputs(states, old) == states
    new = {f"input.{path}": states[str(path)] | {"sha256": "0" * 64}}
    assert describe_inputs(states, new) == {str(path): new[f"input.{path}"]}
    assert find_changes(old, new) == []
    assert len(find_changes(old, {f"input.{path}": new[f"input.{path}"] | {"mtime_ns": 5}})) == 1


def test_objects_in_stores_are_not_read(tmp_path):
    import fsspec

    with fsspec.open("memory://logs/log.csv", "w") as file:
        file.write("text")
    assert describe("memory://logs/log.csv").keys() == {"size", "mtime_ns"}


def test_a_log_that_was_copied_again_is_done(tmp_path, monkeypatch):
    folder = shutil.copytree(ASSET, tmp_path / "copy")
    monkeypatch.chdir(folder)
    set_input_times(folder)
    run = RunDir(folder / "run")
    config = load_config(run.path / "config.yaml")
    assert is_step_current(run, "data", compute_step_fingerprint(config, run, "data"))  # of 0.1: by size and time
    record = run.read_record("data")
    run.record_path("data").unlink()
    run.write_record("data", record | {"fingerprint": compute_step_fingerprint(config, run, "data")})
    for name in ("ratings.csv", "items.csv"):
        os.utime(folder / name)
    assert is_step_current(run, "data", compute_step_fingerprint(config, run, "data"))
    (folder / "ratings.csv").write_text((folder / "ratings.csv").read_text() + "1,1,5,1200000000\n")
    with pytest.raises(ArtifactError, match=r"input\.ratings\.csv"):
        is_step_current(run, "data", compute_step_fingerprint(config, run, "data"))
