"""The heap's settings reach a process, and leave alone what somebody has chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from collm_dist import heap

_SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
from collm_dist.heap import VARIABLE, restart_with_heap
print(os.getpid(), sys.argv[1:], sys.flags.utf8_mode, flush=True)
restart_with_heap()
print(os.getpid(), sys.argv[1:], sys.flags.utf8_mode, os.environ[VARIABLE])
"""


def _run(arguments: list[str], **settings: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != heap.VARIABLE} | settings
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def _write(text: str, path: Path) -> str:
    path.write_text(text.format(root=str(Path(heap.__file__).parent.parent)), encoding="utf-8")
    return str(path)


@pytest.fixture
def script(tmp_path: Path) -> str:
    return _write(_SCRIPT, tmp_path / "command.py")


@pytest.mark.skipif(not heap.choose_heap({}), reason="this machine has a GPU, or no glibc")
def test_a_process_starts_anew_as_it_was_called(script: str) -> None:
    first, again, end = _run(["-X", "utf8", script, "--stage", "2"]).splitlines()
    assert first == again
    assert end == f"{first} {heap.SETTINGS}"


@pytest.mark.parametrize("chosen", ["", "glibc.malloc.check=0"])
def test_what_somebody_has_chosen_stays(script: str, chosen: str) -> None:
    first, end = _run([script], **{heap.VARIABLE: chosen}).splitlines()
    assert end == f"{first} {chosen}"


def test_nothing_is_set_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(heap, "_GPUS", (tmp_path / "nvidiactl",))
    monkeypatch.setattr(heap.sys, "platform", "linux")
    assert heap.choose_heap({})
    (tmp_path / "nvidiactl").touch()
    assert not heap.choose_heap({})
