"""Identity of input files: content, whatever their time."""

import os
import shutil

import pytest

from collm_dist.config.loader import load_config
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import ArtifactError, DataError
from collm_dist.runs.fingerprints import find_changes, is_step_current
from collm_dist.runs.input_files import describe_file, drop_times, is_same_input, keep_old_entries
from collm_dist.runs.run_dir import RunDir
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
