"""Paths of a run directory, and records of its finished steps.

A step is done when its record (manifest.json, summary.json or report.json) exists and has the current fingerprint. The
record is written last, by rename, so an incomplete step has no record.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from collm_dist.errors import ArtifactError
from collm_dist.runs.atomic_files import compute_json_hash, write_json

Step = Literal["data", "cf", "stage1", "stage2", "eval"]
StageName = Literal["stage1", "stage2"]

STEPS: tuple[Step, ...] = ("data", "cf", "stage1", "stage2", "eval")
STAGES: tuple[StageName, ...] = ("stage1", "stage2")
# Files in a stage's folder ``checkpoints``; the names sort by step.
CHECKPOINT_PATTERN = "step-*.safetensors"
_HASH = "record_hash"


@dataclass(frozen=True)
class RunDir:
    """Paths below one run directory."""

    path: Path

    def step_dir(self, step: Step) -> Path:
        """Folder of a step."""
        return self.path / step

    @property
    def anchor_dir(self) -> Path:
        """Folder of the anchor, which is made from data and CF model before the first stage that needs it."""
        return self.path / "anchor"

    def record_path(self, step: Step) -> Path:
        """Record, whose existence marks the step as done."""
        name = {"data": "manifest.json", "eval": "report.json"}.get(step, "summary.json")
        return self.path / step / name

    def write_record(self, step: Step, record: Mapping[str, Any]) -> None:
        """Write a step's record with a hash of its content; afterwards the step is done."""
        write_json(self.record_path(step), add_record_hash(record))

    def read_record(self, step: Step) -> dict[str, Any]:
        """Read a finished step's record.

        Raises:
            ArtifactError: the step is not done, or its record is damaged.
        """
        path = self.record_path(step)
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            check_record_hash(record)
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing: run the step '{step}' first") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): run the step '{step}' again with --force") from None
        if not isinstance(record, dict) or not isinstance(record.get("fingerprint", {}), dict):
            raise ArtifactError(f"{path} is not a step record: run the step '{step}' again with --force")
        return record

    def read_content_hash(self, step: Step) -> str:
        """Return the hash that identifies a finished step's result.

        Raises:
            ArtifactError: the step is not done, or its record is damaged.
        """
        content_hash = self.read_record(step).get("content_hash")
        if not isinstance(content_hash, str):
            path = self.record_path(step)
            raise ArtifactError(f"{path} has no content hash: run the step '{step}' again with --force")
        return content_hash

    def is_done(self, step: Step) -> bool:
        """Whether the step's record exists, with any fingerprint."""
        path = self.record_path(step)
        return path.exists() or path.is_symlink()

    def withdraw(self, step: Step) -> None:
        """Delete a step's record before its files change.

        Links to another run, of the step's folder or its entries, are removed, so that the other run's files do not
        change. A link ``checkpoints`` stays; it leads to another disk.
        """
        folder = self.step_dir(step)
        if folder.is_symlink():
            folder.unlink()
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.is_symlink() and entry.name != "checkpoints":
                entry.unlink()
        _remove(self.record_path(step))  # a folder in its place is damage


def clear_checkpoints(folder: Path) -> None:
    """Remove a step's folder of checkpoints; if it is a link to a folder on another disk, only what that contains."""
    if not folder.is_symlink():
        _remove(folder)
        return
    for entry in folder.iterdir() if folder.is_dir() else ():
        _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def add_record_hash(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with a hash of its content."""
    content: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return content | {_HASH: compute_json_hash(content)}


def check_record_hash(record: Any) -> None:
    """Remove a record's hash of its content, and check it; records of release 0.1 have none.

    Raises:
        ValueError: the content is another.
    """
    recorded = record.pop(_HASH, None) if isinstance(record, dict) else None
    if recorded is not None and recorded != compute_json_hash(record):
        raise ValueError("its content is not that of its hash")


def normalize(path: Path) -> Path:
    """Return an absolute path without ``..``, whose last part is a name; links are not followed."""
    return Path(os.path.normpath(path.absolute()))
