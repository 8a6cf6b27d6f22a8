"""SHA-256 of every file of a finished step, recorded when the step ends and compared wherever the files are used."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from collm_dist.errors import ArtifactError, DiskError
from collm_dist.phases import show_phase
from collm_dist.runs.atomic_files import compute_file_hash, open_atomic
from collm_dist.runs.run_dir import RunDir, Step

# Files of a step that later steps and recommenders read; logs and checkpoints are not among them.
_FOLDERS = ("adapter", "merged", "scores")
_PATTERNS = ("*.safetensors", "*.md", "*.csv", "*.png")
# Release 0.1 recorded the hash of one file of a stage, as the stage's content hash.
_HASHED_BY_0_1: dict[Step, str] = {
    "stage1": "adapter/adapter_model.safetensors",
    "stage2": "mapping.safetensors",
}
_CACHE = ".hashes.json"
# State of the files that this process has read, and their hashes.
_known: dict[tuple[str | int, ...], str] = {}


def hash_products(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the product files in a step's folder by relative path, for its record."""
    files = [path for pattern in _PATTERNS for path in folder.glob(pattern) if not path.name.startswith(".")]
    files += [path for name in _FOLDERS for path in (folder / name).rglob("*") if path.is_file()]
    with show_phase(f"{folder.name}: hashing", sum(path.stat().st_size for path in files), "B") as phase:
        return {path.relative_to(folder).as_posix(): compute_file_hash(path, phase.advance) for path in sorted(files)}


def read_hashes(run_dir: RunDir, step: Step) -> dict[str, str]:
    """Return the recorded SHA-256 of a step's files by relative path; empty if none is recorded.

    Raises:
        ArtifactError: the record is damaged.
    """
    if not run_dir.is_done(step):
        return {}
    record = run_dir.read_record(step)
    try:
        if step == "data":
            infos = [*record.get("shards", ()), *record.get("buckets", ())]
            return {**record.get("tables", {}), **{info["path"]: info["sha256"] for info in infos}}
        if "files" not in record and step in _HASHED_BY_0_1:
            return {_HASHED_BY_0_1[step]: str(record["content_hash"])}
        return {str(name): str(value) for name, value in record.get("files", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path = run_dir.record_path(step)
        raise ArtifactError(f"{path} is damaged ({error}): run the step '{step}' again with --force") from None


def check_files(run_dir: RunDir, step: Step, *parts: str, keep: bool = False) -> None:
    """Check the files of a finished step against their recorded hashes; files without a recorded hash are accepted.

    Args:
        run_dir, step: the step; nothing is checked if it is not done.
        parts: beginnings of the relative paths to check; default all.
        keep: remember the result in the run directory, so that the next process reads only files that have changed
            since (``read_state``). Otherwise each process reads every file once.

    Raises:
        ArtifactError: a file is missing or has other bytes; the message names it and the remedy.
    """
    hashes = read_hashes(run_dir, step)
    cache = _read_cache(run_dir) if keep else {}
    found: dict[str, list[Any]] = {}
    with show_phase(f"{step}: checking files", unit="B") as phase:
        for name, expected in hashes.items():
            if parts and not name.startswith(parts):
                continue
            path = run_dir.step_dir(step) / name
            key = f"{step}/{name}"
            try:
                state = read_state(path)
                is_known = key in cache and cache[key][0] == state
                actual = cache[key][1] if is_known else hash_once(path, phase.advance)
            except OSError as error:
                raise ArtifactError(f"{path} cannot be read ({error.strerror or error}): {_advise(step)}") from None
            if actual != expected:
                raise ArtifactError(f"{path} is damaged (its SHA-256 is not the recorded one): {_advise(step)}")
            found[key] = [state, actual]
    if keep and not found.items() <= cache.items():
        with suppress(DiskError, OSError), open_atomic(run_dir.path / _CACHE) as file:
            json.dump(cache | found, file)


def _advise(step: Step) -> str:
    return f"restore it from a copy, or redo the step with --force {step}"


def read_state(path: Path) -> list[int]:
    """Return numbers of a file that change with its bytes: a key for the cache of its hash, never its identity.

    The time of the last change (ctime) is among them, since no program can set it back.

    Raises:
        OSError: there is no such file.
    """
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def hash_once(path: Path, on_read: Callable[[int], object] = lambda _: None) -> str:
    """Return the SHA-256 of a file, which is read once by this process, and again if it changes.

    Raises:
        OSError: it cannot be read.
    """
    key: tuple[str | int, ...] = (str(path.resolve()), *read_state(path))
    if key not in _known:
        _known[key] = compute_file_hash(path, on_read)
    return _known[key]


def _read_cache(run_dir: RunDir) -> dict[str, Any]:
    try:
        cache = json.loads((run_dir.path / _CACHE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    is_valid = isinstance(cache, dict) and all(isinstance(entry, list) and len(entry) == 2 for entry in cache.values())
    return cache if is_valid else {}
