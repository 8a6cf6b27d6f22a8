"""The run directory: where steps write, when a step counts as done, and how files get there whole.

A step is done when its record (manifest.json or summary.json) exists and its fingerprint equals today's. The record is
written last, by rename, so a half-written step has none. A fingerprint is a flat mapping of what the step depends on:
the config fields that it reads, the content hashes of the steps before it, and the input files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from collm_dist.config import Config
from collm_dist.errors import ArtifactError, DiskError

Step = Literal["data", "cf", "stage1", "stage2", "eval"]
STEPS: tuple[Step, ...] = ("data", "cf", "stage1", "stage2", "eval")

# The config fields that each step reads, as dotted prefixes. Fields marked operational are left out below.
STEP_FIELDS: dict[Step, tuple[str, ...]] = {
    "data": ("run.seed", "dataset", "preprocessing", "evaluation.num_candidates"),
    "cf": ("run.seed", "cf"),
    "stage1": ("run.seed", "prompt", "llm", "lora", "stage1"),
    "stage2": ("run.seed", "prompt", "llm", "mapping", "stage2"),
    "eval": ("run.seed", "evaluation", "promotion.baseline"),
}
# What only the other stage reads.
STEP_FIELDS_EXCLUDED: dict[Step, tuple[str, ...]] = {
    "data": ("dataset.expect",),
    "cf": (),
    "stage1": ("prompt.stage2",),
    "stage2": ("prompt.stage1",),
    "eval": (),
}
UPSTREAM: dict[Step, tuple[Step, ...]] = {
    "data": (),
    "cf": ("data",),
    "stage1": ("data",),
    "stage2": ("data", "cf", "stage1"),
    "eval": ("data", "cf", "stage1", "stage2"),
}


@dataclass(frozen=True)
class RunDir:
    """Paths below one run directory."""

    path: Path

    def step_dir(self, step: Step) -> Path:
        """Folder of a step."""
        return self.path / step

    def record_path(self, step: Step) -> Path:
        """File whose existence says that the step is done."""
        name = {"data": "manifest.json", "eval": "report.json"}.get(step, "summary.json")
        return self.path / step / name

    def read_record(self, step: Step) -> dict[str, Any]:
        """Read a finished step's record.

        Raises:
            ArtifactError: the step is not done, or its record is damaged.
        """
        path = self.record_path(step)
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing: run the step '{step}' first") from None
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): run the step '{step}' again with --force") from None
        if not isinstance(record, dict):
            raise ArtifactError(f"{path} is no record of a step: run the step '{step}' again with --force")
        return record

    def is_done(self, step: Step) -> bool:
        """Whether the step's record exists (its fingerprint is another question)."""
        return self.record_path(step).exists()

    def withdraw(self, step: Step) -> None:
        """Take a step's record back before its files change: from then on it is not done.

        A step that is linked in from another run is let go whole: the other run's files are not ours to change.
        """
        folder = self.step_dir(step)
        if folder.is_symlink():
            folder.unlink()
        self.record_path(step).unlink(missing_ok=True)


def flatten_config(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return the non-operational fields as ``{dotted path: JSON value}``."""
    flat: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("operational"):
            continue
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            flat.update(flatten_config(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = json.loads(json.dumps(value))
    return flat


def compute_fingerprint(
    config: Config,
    step: Step,
    run_dir: RunDir,
    inputs: Mapping[str, Any] | None = None,
    *,
    skip_missing: bool = False,
) -> dict[str, Any]:
    """Return what a step depends on, today.

    Args:
        config: the experiment.
        step: the step in question.
        run_dir: where the steps before it have their records.
        inputs: further dependencies, such as input files with size and modification time, or prompt texts.
        skip_missing: leave out steps that are not done instead of raising; evaluation reports what there is.

    Raises:
        ArtifactError: a step that this one builds on is not done, or its record is damaged.
    """

    def covers(prefixes: tuple[str, ...], key: str) -> bool:
        return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)

    included, excluded = STEP_FIELDS[step], STEP_FIELDS_EXCLUDED[step]
    fingerprint = {
        f"config.{key}": value
        for key, value in flatten_config(config).items()
        if covers(included, key) and not covers(excluded, key)
    }
    for upstream in UPSTREAM[step]:
        if upstream == "stage1" and not config.stage1.enabled:
            continue
        if skip_missing and not run_dir.is_done(upstream):
            continue
        record = run_dir.read_record(upstream)
        if "content_hash" not in record:
            path = run_dir.record_path(upstream)
            raise ArtifactError(f"{path} has no content hash: run the step '{upstream}' again with --force")
        fingerprint[f"upstream.{upstream}"] = record["content_hash"]
    for key, value in (inputs or {}).items():
        fingerprint[f"input.{key}"] = json.loads(json.dumps(value))
    return fingerprint


def find_changes(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return one line for each key in which two fingerprints differ: ``key: old -> new``."""
    return [
        f"{key}: {recorded.get(key, '(absent)')} -> {current.get(key, '(absent)')}"
        for key in sorted(set(recorded) | set(current))
        if recorded.get(key) != current.get(key)
    ]


def is_step_current(run_dir: RunDir, step: Step, fingerprint: Mapping[str, Any]) -> bool:
    """Return whether the step is done with this fingerprint.

    Raises:
        ArtifactError: it was done with another one; the message names the differing keys and the remedies.
    """
    if not run_dir.is_done(step):
        return False
    changes = find_changes(run_dir.read_record(step).get("fingerprint", {}), fingerprint)
    if changes:
        raise ArtifactError(
            f"step '{step}' in {run_dir.path} was made from something else:\n  "
            + "\n  ".join(changes)
            + f"\nEither redo it (--force {step}; later steps follow) or set run.dir to a new directory."
        )
    return True


@contextmanager
def open_atomic(path: Path, mode: str = "w", size_bytes: int | None = None) -> Iterator[Any]:
    """Open a temporary file beside ``path``; on success it is on the disk and bears that name, else it is removed.

    Args:
        path: the file; until the end of the block whatever bore its name is untouched.
        mode: w or wb.
        size_bytes: what will be written, where that is known; for the message of an error.

    Raises:
        DiskError: the disk is full or writing is not allowed.
    """
    with explain_disk_errors(path, size_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)  # mkstemp's 0600 would hide the file from colleagues
            Path(name).replace(path)
            _sync(path.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _sync(path: Path) -> None:
    """Bring a file to the disk, or a folder's list of names, without which a power failure may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what file systems say that cannot do it
            raise
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Bring all files below a folder to the disk, for libraries that leave that to the system."""
    for path in (folder, *folder.rglob("*")):
        _sync(path)


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def explain_disk_errors(path: Path, size_bytes: int | None = None) -> Iterator[None]:
    """Raise DiskError where the block cannot write because the disk is full or writing is not allowed.

    Args:
        path: file that the block writes, or folder below which it does.
        size_bytes: what it writes, where that is known.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        code = _find_errno(error)
        named = Path(str(error.filename)) if isinstance(error, OSError) and error.filename else None
        related = (
            named is None or named in (path, *path.parents) or path in named.parents or named.parent == path.parent
        )
        if code not in _FULL and not (code in _FORBIDDEN and related):
            raise
        needed = "" if size_bytes is None else f", {size_bytes / 2**20:,.1f} MiB needed"
        remedy = "make space there" if code in _FULL else "allow writing there, or set run.dir to another directory"
        raise DiskError(
            f"{named or path} cannot be written: {os.strerror(code or 0)} ({_describe_free(named or path)}{needed}); "
            f"{remedy}, then run the same command again. What was whole before is untouched"
        ) from error


def _find_errno(error: Exception) -> int | None:
    """Return the system's error number, also where a library written in Rust has it in its message alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _describe_free(path: Path) -> str:
    folder = next((one for one in (path, *path.parents) if one.exists()), None)
    return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB free" if folder else "free space unknown"


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part. NaN is refused: it is not JSON."""
    with open_atomic(path) as file:
        json.dump(value, file, indent=2, sort_keys=True, allow_nan=False)
        file.write("\n")


def compute_file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compute_json_hash(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
