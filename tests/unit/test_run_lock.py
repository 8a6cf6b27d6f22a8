"""One writer per run directory."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from collm_dist.errors import ArtifactError, LaunchError
from collm_dist.runs import lock as run_lock
from collm_dist.runs.lock import LOCK_NAME, STALE_SECONDS, TOKEN_VARIABLE, hold_run_lock

HOLD = (
    "import sys, time; from pathlib import Path; from collm_dist.runs.lock import hold_run_lock\n"
    "with hold_run_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


@pytest.fixture
def stranger(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_lock_is_left_behind_clean(tmp_path):
    with hold_run_lock(tmp_path / "new"):
        assert (tmp_path / "new" / LOCK_NAME).exists()
    assert not (tmp_path / "new" / LOCK_NAME).exists()
    assert TOKEN_VARIABLE not in os.environ


def test_nothing_empty_stays(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    for folder in (tmp_path / "runs" / "new", kept):
        with hold_run_lock(folder):
            (folder / "stage1" / "checkpoints").mkdir(parents=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert [path.name for path in kept.iterdir()] == [f"{LOCK_NAME}.guard"]
    with hold_run_lock(tmp_path / "runs" / "new"):
        (tmp_path / "runs" / "new" / "record").touch()
    assert (tmp_path / "runs" / "new" / "record").exists()


@pytest.mark.parametrize("is_refused", [False, True])
def test_empty_folders_of_others_stay(tmp_path, is_refused):
    """An output that names a project or a share by mistake."""
    others = [tmp_path / "inbox", tmp_path / ".git" / "refs" / "heads"]
    for folder in others:
        folder.mkdir(parents=True)
    with suppress(ValueError), hold_run_lock(tmp_path):
        (tmp_path / "scores").mkdir()
        (tmp_path / "linked").symlink_to(tmp_path / ".git")
        if is_refused:
            raise ValueError("refused")
    assert all(folder.is_dir() for folder in others)
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(("name", "stays"), [("config.yaml", False), ("status.json", True)])
def test_settings_alone_are_not_left_by_a_failure(tmp_path, name, stays):
    def fail():
        with hold_run_lock(tmp_path / "new"):
            (tmp_path / "new" / name).touch()
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        fail()
    assert (tmp_path / "new").exists() == stays


@pytest.mark.slow
def test_processes_that_come_and_go_leave_one_holder_at_a_time(tmp_path):
    """Each removes the folder that the others wait for."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom collm_dist.errors import LaunchError\n"
        "from collm_dist.runs.lock import hold_run_lock\nfolder = Path(sys.argv[1])\n"
        "for _ in range(60):\n    try:\n        with hold_run_lock(folder / 'run'):\n"
        "            (folder / 'held').open('x').close()\n            (folder / 'held').unlink()\n"
        "    except LaunchError:\n        pass\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_a_living_holder_is_named(tmp_path, stranger):
    with pytest.raises(LaunchError, match=f"process {stranger.pid} on "), hold_run_lock(tmp_path):
        pass


def test_the_argument_that_names_the_folder_is_the_remedy(tmp_path, stranger):
    with (
        pytest.raises(LaunchError, match=r"^--output: .*, or set --output to another directory"),
        hold_run_lock(tmp_path, setting="--output"),
    ):
        pass


@pytest.mark.parametrize("name", ["taken", "taken/deeper"])
def test_a_file_in_the_place_of_the_folder_is_named(tmp_path, name):
    (tmp_path / "taken").write_text("mine")
    with (
        pytest.raises(ArtifactError, match=r"taken.*move the existing file or folder away"),
        hold_run_lock(tmp_path / name),
    ):
        pass
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_dead_holder_is_taken_over(tmp_path, stranger, caplog):
    stranger.kill()
    stranger.wait()
    with hold_run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert "taking over" in caplog.text


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path):
    with hold_run_lock(tmp_path):
        holder = json.loads((tmp_path / LOCK_NAME).read_text())
    (tmp_path / LOCK_NAME).write_text(json.dumps(holder | {"started": holder["started"] - 1000, "token": "old"}))
    with hold_run_lock(tmp_path):
        pass


def test_on_another_host_the_age_of_the_heartbeat_tells(tmp_path):
    path = tmp_path / LOCK_NAME
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0, "token": "theirs"}))
    with pytest.raises(LaunchError, match="process 1 on elsewhere"), hold_run_lock(tmp_path):
        pass
    old = time.time() - STALE_SECONDS - 5
    os.utime(path, (old, old))
    with hold_run_lock(tmp_path):
        assert json.loads(path.read_text())["token"] != "theirs"


def test_children_work_under_their_parents_lock(tmp_path):
    with hold_run_lock(tmp_path):
        code = "import sys; from pathlib import Path; from collm_dist.runs.lock import hold_run_lock\n"
        code += "with hold_run_lock(Path(sys.argv[1])): pass"
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        assert (tmp_path / LOCK_NAME).exists()


@pytest.fixture
def interruptible():
    """Interrupts as in a terminal, wherever the tests run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_until(is_so, seconds=30):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_heartbeats(tmp_path):
    beats = []
    with hold_run_lock(tmp_path, lambda: beats.append(1), beat_seconds=0.02):
        os.utime(tmp_path / LOCK_NAME, (0, 0))
        time.sleep(0.3)
        assert time.time() - (tmp_path / LOCK_NAME).stat().st_mtime < 10
    assert len(beats) > 2


def test_a_heartbeat_that_fails_is_not_the_last(tmp_path, caplog):
    beats = []

    def fail_once():
        beats.append(1)
        if len(beats) == 1:
            raise OSError(errno.EIO, "Input/output error")

    with hold_run_lock(tmp_path, fail_once, beat_seconds=0.02):
        wait_until(lambda: len(beats) > 2)
    assert "a heartbeat failed ([Errno 5] Input/output error)" in caplog.text


@pytest.mark.usefixtures("interruptible")
def test_a_lock_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path, caplog):
    beats, path = [], tmp_path / LOCK_NAME
    with hold_run_lock(tmp_path, lambda: beats.append(1), beat_seconds=0.1):
        path.rename(tmp_path / "aside")
        path.mkdir()  # reading fails, also for root
        wait_until(lambda: "cannot be read" in caplog.text)
        path.rmdir()
        (tmp_path / "aside").rename(path)
        count = len(beats)
        wait_until(lambda: len(beats) > count + 2)
    assert not path.exists()


def test_a_lock_that_cannot_be_read_is_not_taken_over(tmp_path):
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(ArtifactError, match=r"\.lock: Is a directory"), hold_run_lock(tmp_path):
        pass


THEIRS = json.dumps({"host": "a", "pid": 1, "started": 0.0, "token": "b"})


@pytest.mark.usefixtures("interruptible")
def test_who_loses_the_lock_stops(tmp_path):
    with pytest.raises(KeyboardInterrupt), hold_run_lock(tmp_path, beat_seconds=0.02):  # noqa: PT012
        (tmp_path / LOCK_NAME).write_text(THEIRS)
        time.sleep(5)
    assert (tmp_path / LOCK_NAME).exists()
    assert run_lock.LOCK_NAME == ".lock"


def test_who_loses_the_lock_stops_where_interrupts_are_ignored(tmp_path):
    program = (
        "import signal, subprocess, sys, time; from pathlib import Path\n"
        "from collm_dist.runs.lock import hold_run_lock\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with hold_run_lock(Path(sys.argv[1]), beat_seconds=0.02):\n"
        "    child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(holder.stdout.readline()))
    (tmp_path / LOCK_NAME).write_text(THEIRS)
    assert holder.wait(30) == LaunchError.exit_code
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert (tmp_path / LOCK_NAME).read_text() == THEIRS


@pytest.mark.parametrize(
    "change",
    [{"token": None}, {"token": ""}, {"token": 3}, {"pid": "1"}, {"pid": -1}, {"pid": 1 << 40}, {"started": "x"},
     {"started": None}, {"host": None}],
)  # fmt: skip
def test_a_lock_that_no_process_wrote_ends_no_process(tmp_path, change):
    """A token of null would be that of every process without a lock."""
    holder = {"host": "elsewhere", "pid": 1, "started": 0.0, "token": "0" * 32} | change
    (tmp_path / LOCK_NAME).write_text(json.dumps(holder))
    os.utime(tmp_path / LOCK_NAME, (0, 0))
    assert run_lock._read_holder(tmp_path / LOCK_NAME) is None
    with hold_run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_a_guard_that_is_a_link_writes_nothing_elsewhere(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f"{LOCK_NAME}.guard").symlink_to(tmp_path / "mine")
    with pytest.raises(ArtifactError, match=r"guard.*; move the existing file"), hold_run_lock(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
