"""Weights that a kept run links from a removed run."""

import subprocess
import sys

import pytest

from collm_dist.runs.run_dir import RunDir
from collm_dist.runs.user_deletion import HeldUsers, remove_leftovers, remove_runs

# A call that the machine loses when it is about to put the copy of stage1/adapter in place.
KILLED = """
import os, sys
from pathlib import Path
from collm_dist.runs.user_deletion import HeldUsers, remove_runs

def end(event, arguments):
    if event == "os.rename" and Path(arguments[1]).name == "adapter":
        os._exit(9)

sys.addaudithook(end)
remove_runs([HeldUsers(Path("old"), 2), HeldUsers(Path("new"), 0)])
"""


@pytest.fixture
def linked(tmp_path):
    """A run ``new`` without listed users that links an anchored stage 1 of ``old``, as ``Stage1.take_over`` does."""
    for name in ("old", "new"):
        (tmp_path / name / "data").mkdir(parents=True)
        RunDir(tmp_path / name).write_record("stage1", {"stage": "stage1"})
    products = {"adapter": "weights.safetensors", "merged": "model.safetensors"}
    for folder, file in products.items():
        (tmp_path / "old" / "stage1" / folder).mkdir()
        (tmp_path / "old" / "stage1" / folder / file).write_text(f"weights of {folder}")
    (tmp_path / "old" / "stage1" / "anchored_score.safetensors").write_text("weights of the gain")
    for name in (*products, "anchored_score.safetensors"):
        (tmp_path / "new" / "stage1" / name).symlink_to(f"../../old/stage1/{name}")
    return tmp_path


def check_removed(folder):
    """The old run is gone, and the new one has all weights and nothing else."""
    assert [path.name for path in folder.iterdir()] == ["new"]
    files = {
        path.relative_to(folder / "new" / "stage1").as_posix(): path.read_text()
        for path in (folder / "new" / "stage1").rglob("*")
        if path.is_file() and path.name != "summary.json"
    }
    assert files == {
        "adapter/weights.safetensors": "weights of adapter",
        "merged/model.safetensors": "weights of merged",
        "anchored_score.safetensors": "weights of the gain",
    }
    assert not any(path.is_symlink() for path in (folder / "new" / "stage1").iterdir())


def remove(folder):
    held = [HeldUsers(folder / "old", 2), HeldUsers(folder / "new", 0)]
    assert remove_runs(held) == [folder / "old"]
    remove_leftovers([folder / "old"])


def test_linked_folders_and_files_are_copied(linked):
    remove(linked)
    check_removed(linked)


def test_a_copy_that_was_about_to_take_the_links_place_is_kept(linked):
    assert subprocess.run([sys.executable, "-c", KILLED], cwd=linked).returncode == 9
    assert not (linked / "new" / "stage1" / "adapter").exists()
    remove(linked)
    check_removed(linked)


def test_an_incomplete_copy_is_made_anew(linked):
    assert subprocess.run([sys.executable, "-c", KILLED], cwd=linked).returncode == 9
    (copy,) = (linked / "new" / "stage1").glob(".adapter*")
    (copy / "weights.safetensors").write_text("weig")
    (linked / "new" / "stage1" / "adapter").symlink_to("../../old/stage1/adapter")
    remove(linked)
    check_removed(linked)
