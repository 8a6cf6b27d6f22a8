"""A tuning stage as a forked process, observed from outside: its progress and its outcome.

Importing torch and DeepSpeed takes longer than the run, so a parent imports them once and forks; the child then runs
``launch/train.py`` unchanged. Three of its methods are wrapped to record their next action in memory shared with the
parent; their behaviour stays the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collm_dist import monitoring
from collm_dist.tuning.loop import TuningLoop

REPOSITORY = Path(__file__).parents[2]
# Crosses validations, checkpoints and two ends of epochs, with something random in it.
SETTINGS = (
    "lora.dropout=0.3",
    "stage1.max_steps=30",
    "stage1.eval_every_steps=10",
    "stage1.max_train_contexts=100",
    "monitoring.tensorboard=false",
)
PHASES = ("start", "step", "save", "evaluation", "between", "product")
PRODUCTS = ("adapter/adapter_model.safetensors", "merged/model.safetensors")
_PHASE_OF = {"train_step": "step", "_save": "save", "_validate": "evaluation"}
_TIMEOUT_SECONDS = 120.0
_FORMAT = "=iid"


class Board:
    """Shared memory in which the child says what it does: phase, steps made, since when."""

    def __init__(self) -> None:
        """Before the fork."""
        self._memory = mmap.mmap(-1, struct.calcsize(_FORMAT))

    def write(self, phase: str, steps: int) -> None:
        """Say what comes next."""
        struct.pack_into(_FORMAT, self._memory, 0, PHASES.index(phase), steps, time.monotonic())

    def read(self) -> tuple[str, int, float]:
        """Return phase, steps made by this process, and the time at which the phase began."""
        phase, steps, since = struct.unpack_from(_FORMAT, self._memory, 0)
        return PHASES[phase], steps, since


@dataclass
class StageRun:
    """One process that trains stage 1 of a run directory."""

    folder: Path
    overrides: list[str]
    board: Board = field(default_factory=Board)
    pid: int = 0
    code: int | None = None

    def start(self) -> StageRun:
        """Fork."""
        self.board.write("start", 0)
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._train())
        return self

    def _train(self) -> int:
        log = os.open(self.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        self._wrap_methods()
        spec = importlib.util.spec_from_file_location("train", REPOSITORY / "launch" / "train.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        settings = [*self.overrides, *SETTINGS, f"run.dir={self.folder}"]
        sys.argv = ["train.py", "--config", "configs/tiny_cpu.yaml", "--stage", "1", *settings]
        os.chdir(REPOSITORY)
        try:
            return int(module.main())
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def _wrap_methods(self) -> None:
        steps, board = 0, self.board

        def wrap(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def call(loop: TuningLoop, *arguments: Any) -> Any:
                nonlocal steps
                board.write(_PHASE_OF[name], steps)
                result = method(loop, *arguments)
                steps += name == "train_step"
                board.write("product" if loop.progress.is_finished and name == "_save" else "between", steps)
                return result

            return call

        for name in _PHASE_OF:
            setattr(TuningLoop, name, wrap(name, getattr(TuningLoop, name)))

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        """Wait for the end.

        Raises:
            TimeoutError: it hangs; it has been killed.
        """
        return self.wait_until(lambda: False) or 0

    def wait_until(self, condition: Callable[[], bool]) -> int | None:
        """Wait for a condition, or the end; returns the exit code, None if it runs still.

        Raises:
            TimeoutError: neither came; the process has been killed.
        """
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while self.poll() is None and not condition():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{self.folder}: hangs in phase {self.board.read()[0]}")
            time.sleep(0.0002)
        return self.code

    def kill(self) -> str | None:
        """Kill with SIGKILL; returns the phase that was hit, None if the process had already ended by itself."""
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)
        return self.board.read()[0] if self.code == -signal.SIGKILL else None


def choose_moment(run: StageRun, dice: random.Random, seconds: float) -> int | None:
    """Let a run come to a random moment after its first step: any, or one inside a save or an evaluation.

    Args:
        run: started.
        dice: of the draw.
        seconds: that an undisturbed run takes from its first step on.

    Returns:
        The exit code if the run ended before, None if it is at that moment.
    """
    if run.wait_until(lambda: run.board.read()[1] >= 1) is not None:
        return run.code
    phase = dice.choice(("any", "any", "save", "evaluation"))
    if phase == "any":
        moment = time.monotonic() + dice.uniform(0, seconds)
        return run.wait_until(lambda: time.monotonic() >= moment)
    first = run.board.read()[1] + dice.randrange(8)
    inside = {"save": 0.005, "evaluation": 0.04}[phase]
    delay = dice.uniform(0, inside)

    def is_there() -> bool:
        now, steps, since = run.board.read()
        return now == phase and steps >= first and time.monotonic() >= since + delay

    return run.wait_until(is_there)


def copy_prepared(source: Path, target: Path) -> Path:
    """Return a fresh copy of a run whose data and CF steps are done."""
    shutil.copytree(source, target, symlinks=True)
    return target


def describe_end(folder: Path) -> dict[str, Any]:
    """Return what a finished stage 1 leaves: hashes of its products, its losses step by step, its summary's numbers."""
    stage = folder / "stage1"
    record = json.loads((stage / "summary.json").read_text(encoding="utf-8"))
    series: dict[str, dict[int, float]] = {}
    for line in monitoring.read_metrics(stage / "metrics.jsonl"):
        for tag in (monitoring.TRAIN_LOSS, monitoring.GRAD_NORM, monitoring.VALID_LOGLOSS):
            if tag in line:
                series.setdefault(tag, {})[line["step"]] = line[tag]
    return {
        "products": {name: hashlib.sha256((stage / name).read_bytes()).hexdigest() for name in PRODUCTS},
        "series": series,
        "summary": {key: record[key] for key in ("best_valid", "last_train", "global_steps", "content_hash")},
    }
