"""Checkpoints: atomic, verified when loaded, with the previous checkpoint kept."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch

from collm_dist.errors import CheckpointError, DamagedCheckpointError, DiskError
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.tuning.checkpoints import (
    Checkpoint,
    Progress,
    load_checkpoint,
    load_last_checkpoint,
    save_checkpoint,
)
from collm_dist.tuning.engine import TrainingState


def make_checkpoint(step: int, size: int = 3) -> Checkpoint:
    weights = {"a": torch.full((2, size), float(step))}
    moments = {"exp_avg.a": torch.full((2, size), step / 2), "exp_avg_sq.a": torch.full((2, size), step**2.0)}
    progress = Progress(
        global_step=step, last_loss=0.7, validated_step=4, best_value=0.6, best_step=4, best_metrics={"auc": 0.6},
        bad_validations=1, nonfinite_skips=2,
    )  # fmt: skip
    return Checkpoint(TrainingState(weights, moments, adam_steps=step), {"a": torch.ones(2, size)}, progress)


def assert_same(first: Checkpoint, second: Checkpoint):
    assert first.progress == second.progress
    assert first.state.adam_steps == second.state.adam_steps
    for ours, theirs in ((first.state.weights, second.state.weights), (first.state.moments, second.state.moments),
                         (first.best_weights, second.best_weights)):  # fmt: skip
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_and_the_two_newest_are_kept(tmp_path):
    for step in (3, 5, 7):
        save_checkpoint(tmp_path, make_checkpoint(step), {"x": 1})
    assert names(tmp_path) == ["step-000000005.safetensors", "step-000000007.safetensors"]
    assert_same(load_last_checkpoint(tmp_path, {"x": 1}), make_checkpoint(7))
    with pytest.raises(CheckpointError, match="x: 1 -> 2"):
        load_last_checkpoint(tmp_path, {"x": 2})


def test_an_empty_folder_gives_an_empty_checkpoint(tmp_path):
    assert load_last_checkpoint(tmp_path, {}) == Checkpoint()
    (tmp_path / ".step-000000003.safetensors.abc.tmp").write_bytes(b"left by a killed process")
    assert load_last_checkpoint(tmp_path, {}) == Checkpoint()
    assert names(tmp_path) == []


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, damage):
    save_checkpoint(tmp_path, make_checkpoint(3), {})
    path = save_checkpoint(tmp_path, make_checkpoint(5), {})
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-5] ^= 4
    path.write_bytes(data[: {"truncated": len(data) // 2, "empty": 0}.get(damage)])
    assert_same(load_last_checkpoint(tmp_path, {}), make_checkpoint(3))
    assert "step-000000005.safetensors: the checkpoint is damaged" in caplog.text
    assert "falling back" in caplog.text
    assert names(tmp_path) == ["step-000000003.safetensors", "step-000000005.damaged"]
    save_checkpoint(tmp_path, make_checkpoint(4), {})
    assert_same(load_last_checkpoint(tmp_path, {}), make_checkpoint(4))


def test_any_flipped_bit_is_found_or_harmless(tmp_path):
    path = save_checkpoint(tmp_path, make_checkpoint(5), {"x": 1})
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for bit in random.choice(len(whole) * 8, 400, replace=False):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        try:
            loaded = load_checkpoint(path, {"x": 1})
        except DamagedCheckpointError:
            continue
        assert_same(loaded, make_checkpoint(5))  # padding of the header


def test_training_does_not_restart_by_itself_if_all_are_damaged(tmp_path):
    for step in (3, 5):
        save_checkpoint(tmp_path, make_checkpoint(step), {}).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        load_last_checkpoint(tmp_path, {})


@pytest.fixture
def small_disk(tmp_path):
    """Return a file system of 256 KiB, and a function that remounts it with other options."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    yield folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_only_the_checkpoint_before(small_disk):
    folder, _ = small_disk
    save_checkpoint(folder, make_checkpoint(3), {})
    too_large = make_checkpoint(5, size=50_000)
    with pytest.raises(DiskError, match=r"step-000000005.*No space left.*0\.2 MiB free, 1\.5 MiB needed"):
        save_checkpoint(folder, too_large, {})
    assert names(folder) == ["step-000000003.safetensors"]
    assert_same(load_last_checkpoint(folder, {}), make_checkpoint(3))
    save_checkpoint(folder, make_checkpoint(5), {})
    assert_same(load_last_checkpoint(folder, {}), make_checkpoint(5))


def test_a_read_only_disk(small_disk):
    folder, remount = small_disk
    save_checkpoint(folder, make_checkpoint(3), {})
    remount("ro")
    with pytest.raises(DiskError, match=r"Read-only.*allow writing there"):
        save_checkpoint(folder, make_checkpoint(5), {})
    assert_same(load_last_checkpoint(folder, {}), make_checkpoint(3))
    remount("rw")
    save_checkpoint(folder, make_checkpoint(5), {})
    assert names(folder) == ["step-000000003.safetensors", "step-000000005.safetensors"]


def test_other_errors_of_the_writer_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), open_atomic(tmp_path / "a.json"):
        (tmp_path / "missing").read_text()
    assert names(tmp_path) == []


def test_a_guard_is_kept_and_other_checkpoints_stay_as_before_it(tmp_path):
    plain = save_checkpoint(tmp_path, make_checkpoint(5), {})
    assert b"guard_" not in plain.read_bytes()
    assert_same(load_checkpoint(plain, {}), make_checkpoint(5))
    guarded = make_checkpoint(6)
    guarded.progress.guard_start, guarded.progress.guard_refusals = 0.0, 3
    assert_same(load_checkpoint(save_checkpoint(tmp_path, guarded, {}), {}), guarded)
