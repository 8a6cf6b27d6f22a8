"""Record of a redo that ``--force`` began, so that the same command resumes it after an interruption.

A step enters the record once its old result and checkpoints are gone; anything there afterwards belongs to the redo.
The record is removed when the command ends, or when another command works in the run. After that, ``--force`` starts
from scratch again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from collm_dist.errors import ArtifactError
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.file_hashes import check_files
from collm_dist.runs.fingerprints import find_changes
from collm_dist.runs.run_dir import RunDir, Step

_FILE = ".redo.json"


@contextmanager
def track_redo(run_dir: RunDir, steps: Sequence[Step], *, is_owner: bool) -> Iterator[Collection[Step]]:
    """Keep the record of a redo during a command.

    Yields the steps that an interrupted call of the same command has begun.

    Args:
        run_dir: the run.
        steps: steps that the command redoes; none without ``--force``.
        is_owner: whether this process took the run's lock; child processes use the owner's record.
    """
    if not is_owner:
        yield ()
        return
    path = run_dir.path / _FILE
    begun = _read_begun(run_dir, steps)
    if begun:
        print(f"--force: resuming the redo of {', '.join(steps)} that was interrupted; to start it over, delete {path}")
    elif steps:
        write_json(path, {"steps": steps, "begun": {}})
    else:
        path.unlink(missing_ok=True)
    try:
        yield sorted(begun)
    except BaseException:
        if not _read_begun(run_dir):  # a refused command leaves nothing
            path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


def note_begun(run_dir: RunDir, step: Step, fingerprint: Mapping[str, Any]) -> None:
    """Record that a step's redo has begun, after its old result and checkpoints were removed.

    Without ``track_redo`` nothing is recorded, and each forced call starts from scratch.
    """
    path = run_dir.path / _FILE
    if path.exists():
        record = _read(run_dir)
        write_json(path, {"steps": record.get("steps"), "begun": _read_begun(run_dir) | {step: fingerprint}})


def has_begun(run_dir: RunDir, step: Step, fingerprint: Mapping[str, Any]) -> bool:
    """Return whether an interrupted redo has begun a step, with this fingerprint, and left nothing damaged."""
    begun = _read_begun(run_dir)
    if step not in begun or find_changes(begun[step], fingerprint):
        return False
    try:
        check_files(run_dir, step, keep=True)
    except ArtifactError:
        return False
    return True


def _read_begun(run_dir: RunDir, steps: Sequence[Step] | None = None) -> dict[Step, dict[str, Any]]:
    """Return the fingerprints of the steps that were begun; with ``steps``, only if the record is of their redo."""
    record = _read(run_dir)
    begun = record.get("begun")
    if not isinstance(begun, dict) or (steps is not None and record.get("steps") != list(steps)):
        return {}
    return {step: fingerprint for step, fingerprint in begun.items() if isinstance(fingerprint, dict)}


def _read(run_dir: RunDir) -> dict[str, Any]:
    try:
        record = json.loads((run_dir.path / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none, or damaged: start from scratch
        return {}
    return record if isinstance(record, dict) else {}
