"""What goes wrong on real machines, done to real processes: each run ends as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess

import pytest

from tests.distributed.conftest import run, start, wait_for_step
from tests.distributed.test_tuning import PYTHON, assert_same_training

SETTINGS = ["lora.dropout=0.3", "--stage", "1", "stage1.max_steps=12"]
PRODUCT = "stage1/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def whole(prepared_run, tmp_path_factory):
    """The folder of a run that nothing has disturbed."""
    folder, overrides = prepared_run
    copied = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(folder, copied)
    run(PYTHON, [*overrides, f"run.dir={copied}", *SETTINGS])
    return copied


def assert_same_end(folder, whole):
    assert_same_training(folder, whole, stages=("stage1",), tolerance=0.0)
    assert (folder / PRODUCT).read_bytes() == (whole / PRODUCT).read_bytes()
    ours, theirs = (json.loads((one / "stage1" / "summary.json").read_text()) for one in (folder, whole))
    for key in ("best_valid", "last_train", "global_steps", "content_hash"):
        assert ours[key] == theirs[key], key


def list_checkpoints(folder):
    return sorted(path.name for path in (folder / "stage1" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_stops_at_the_next_step_and_damage_goes_one_checkpoint_back(copy_run, whole, name):
    """Asked to stop: checkpoint and code 75. Then the newest checkpoint is damaged, in one way or the other."""
    folder, overrides = copy_run("run")
    process = start(PYTHON, [*overrides, *SETTINGS])
    wait_for_step(process, folder, "stage1", 5)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert "run the same command again" in output
    _, newest = list_checkpoints(folder)
    path = folder / "stage1" / "checkpoints" / newest
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data if name == "SIGTERM" else data[:-100])
    output = run(PYTHON, [*overrides, *SETTINGS])
    assert f"{newest}: the checkpoint is damaged" in output
    assert_same_end(folder, whole)


def test_a_full_disk_then_space(copy_run, whole, tmp_path):
    """The run directory's file system is full when a checkpoint is due; later there is space."""
    folder, overrides = copy_run("run")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        (folder / "stage1").mkdir()
        (folder / "stage1" / "checkpoints").symlink_to(disk)
        process = start(PYTHON, [*overrides, *SETTINGS])
        wait_for_step(process, folder, "stage1", 5)
        filler = disk / "filler"
        fill = subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True, text=True)
        assert "No space left" in fill.stderr
        output, _ = process.communicate()
        assert process.returncode == 3, output
        assert "No space left on device (0.0 MiB free" in output
        assert "Traceback" not in output
        kept = list_checkpoints(folder)
        assert kept
        filler.unlink()
        run(PYTHON, [*overrides, *SETTINGS])
        assert_same_end(folder, whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_checkpoints_by_the_clock(copy_run, whole):
    """No step is due for one, but the time is."""
    folder, overrides = copy_run("run")
    settings = ["stage1.checkpoint_every_steps=100", "stage1.checkpoint_every_minutes=1e-4"]
    process = start(PYTHON, [*overrides, *SETTINGS, *settings])
    wait_for_step(process, folder, "stage1", 6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list_checkpoints(folder)
    run(PYTHON, [*overrides, *SETTINGS])
    assert_same_end(folder, whole)
