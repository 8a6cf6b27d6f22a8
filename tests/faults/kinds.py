"""The kinds of faults: each function disturbs one run until it is done and returns the hits and the outcome."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from collm_dist.runs.run_dir import STEPS, RunDir
from tests.faults.stage_runs import REPOSITORY, StageRun, choose_moment, copy_prepared, describe_end

MAX_KILLS = 6
CHANCE_OF_LAST = 0.1


@dataclass(frozen=True)
class Bench:
    """State that all chains share.

    Attributes:
        prepared: run whose data and CF steps are done.
        overrides: its settings.
        whole: result of an undisturbed stage 1.
        seconds: duration of that stage 1 from its first step.
    """

    prepared: Path
    overrides: list[str]
    whole: dict[str, Any]
    seconds: float


def make_bench(prepared: Path, overrides: list[str], folder: Path) -> Bench:
    """Run stage 1 undisturbed.

    Raises:
        RuntimeError: it fails.
    """
    copy_prepared(prepared, folder)
    run = StageRun(folder, overrides).start()
    run.wait_until(lambda: run.board.read()[1] >= 1)
    started = time.monotonic()
    if (code := run.wait()) != 0:
        raise RuntimeError(f"exit code {code}: {(folder / 'output.txt').read_text()}")
    return Bench(prepared, overrides, describe_end(folder), time.monotonic() - started)


def finish(bench: Bench, folder: Path, hits: list[str]) -> dict[str, Any]:
    """Run to the end, undisturbed, and compare."""
    run = StageRun(folder, bench.overrides).start()
    code = run.wait()
    equal = code == 0 and describe_end(folder) == bench.whole
    result: dict[str, Any] = {"hits": hits, "recovered": equal}
    return result if equal else result | {"code": code, "output": (folder / "output.txt").read_text()[-4000:]}


def kill(bench: Bench, folder: Path, dice: random.Random) -> dict[str, Any]:
    """Kill one run up to six times, at random moments; the same command resumes it each time."""
    copy_prepared(bench.prepared, folder)
    hits: list[str] = []
    for _ in range(MAX_KILLS):
        run = StageRun(folder, bench.overrides).start()
        if choose_moment(run, dice, bench.seconds) is not None:
            break  # it came to its end
        if (phase := run.kill()) is None:
            break
        hits.append(phase)
        if dice.random() < CHANCE_OF_LAST:
            break
    return finish(bench, folder, hits)


def damage(bench: Bench, folder: Path, dice: random.Random) -> dict[str, Any]:
    """Kill a run, then cut off or flip something in its newest checkpoint."""
    copy_prepared(bench.prepared, folder)
    run = StageRun(folder, bench.overrides).start()
    if run.wait_until(lambda: run.board.read()[1] >= dice.randrange(6, 25)) is not None or run.kill() is None:
        return finish(bench, folder, [])
    newest = max((folder / "stage1" / "checkpoints").glob("step-*"))
    data, way = bytearray(newest.read_bytes()), dice.choice(("cut", "flip"))
    if way == "cut":
        del data[dice.randrange(len(data)) :]
    else:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    newest.write_bytes(data)
    result = finish(bench, folder, [way])
    noticed = f"{newest.name}: the checkpoint is damaged" in (folder / "output.txt").read_text()
    return result | {"recovered": result["recovered"] and noticed}


def pause(bench: Bench, folder: Path, dice: random.Random) -> dict[str, Any]:
    """Stop a run for a moment with SIGSTOP, several times, and continue it."""
    copy_prepared(bench.prepared, folder)
    run, hits = StageRun(folder, bench.overrides).start(), []
    for _ in range(3):
        if choose_moment(run, dice, bench.seconds / 4) is not None:
            break
        os.kill(run.pid, signal.SIGSTOP)
        hits.append(run.board.read()[0])
        time.sleep(dice.uniform(0.05, 0.5))
        os.kill(run.pid, signal.SIGCONT)
    code = run.wait()
    return {"hits": hits, "recovered": code == 0 and describe_end(folder) == bench.whole}


def disk_full(bench: Bench, folder: Path, dice: random.Random) -> dict[str, Any] | None:
    """Fill the checkpoints' file system, see the run end with code 3, make space. None where mounts are refused."""
    return _on_small_disk(bench, folder, dice, "full")


def read_only(bench: Bench, folder: Path, dice: random.Random) -> dict[str, Any] | None:
    """The same with a file system that becomes read-only."""
    return _on_small_disk(bench, folder, dice, "read-only")


def _on_small_disk(bench: Bench, folder: Path, dice: random.Random, way: str) -> dict[str, Any] | None:
    copy_prepared(bench.prepared, folder)
    disk = folder.with_name(f"{folder.name}-disk")
    disk.mkdir()
    (folder / "stage1").mkdir()
    if _mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)) != 0:
        return None
    try:
        (folder / "stage1" / "checkpoints").symlink_to(disk)
        run = StageRun(folder, bench.overrides).start()
        first = dice.randrange(3, 20)
        run.wait_until(lambda: run.board.read()[1] >= first)
        if way == "full":
            subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'filler'}", "bs=4k"], capture_output=True, check=False)
        else:
            while _mount("-o", "remount,ro", str(disk)) != 0 and run.poll() is None:
                pass  # a checkpoint is being written at this moment
        code = run.wait()
        if way == "full":
            (disk / "filler").unlink()
        else:
            _mount("-o", "remount,rw", str(disk))
        result = finish(bench, folder, [way])
        return result | {"recovered": result["recovered"] and code == 3}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode


def pipeline(bench: Bench, folder: Path, dice: random.Random) -> dict[str, Any]:
    """Kill a whole pipeline, with all processes below it, twice, in steps that are drawn, or anywhere."""
    command = [sys.executable, "launch/run_pipeline.py", "--config", "configs/tiny_cpu.yaml"]
    command += [*bench.overrides, "lora.dropout=0.3", f"run.dir={folder}"]
    hits: list[str] = []
    for _ in range(2):
        with (folder.with_suffix(".txt")).open("a") as log:
            process = psutil.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
        step, longest = dice.choice([*[(name, 3.0) for name in STEPS], (None, bench.seconds)])
        while step is not None and process.poll() is None and _read_step(folder, process.pid) != step:
            time.sleep(0.02)
        try:
            process.wait(timeout=dice.uniform(0, longest))
        except psutil.TimeoutExpired:
            if (hit := _read_step(folder, process.pid)) is not None:
                hits.append(hit)
            for member in [process, *process.children(recursive=True)]:
                member.kill()
            process.wait()
    with (folder.with_suffix(".txt")).open("a") as log:
        code = subprocess.run(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    equal = code == 0 and describe_pipeline_end(folder) == bench.whole
    result: dict[str, Any] = {"hits": hits, "recovered": equal}
    return result if equal else result | {"code": code, "output": folder.with_suffix(".txt").read_text()[-4000:]}


def _read_step(folder: Path, pid: int) -> str | None:
    """Return the step that a pipeline's process is in, None before the first one."""
    path = folder / "status.json"
    status = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return status["step"] if status.get("pid") == pid else None


def describe_pipeline_end(folder: Path) -> dict[str, Any]:
    """Return what a finished pipeline leaves: each step's content hash, which covers its products."""
    return {step: RunDir(folder).read_record(step)["content_hash"] for step in STEPS}
