"""Paths of a run directory, and records of its finished steps.

A step is done when its record (manifest.json, summary.json or report.json) exists and has the current fingerprint. The
record is written last, by rename, so an incomplete step has no record.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from collm_dist.errors import ArtifactError

Step = Literal["data", "cf", "stage1", "stage2", "eval"]
StageName = Literal["stage1", "stage2"]

STEPS: tuple[Step, ...] = ("data", "cf", "stage1", "stage2", "eval")
STAGES: tuple[StageName, ...] = ("stage1", "stage2")


@dataclass(frozen=True)
class RunDir:
    """Paths below one run directory."""

    path: Path

    def step_dir(self, step: Step) -> Path:
        """Folder of a step."""
        return self.path / step

    @property
    def anchor_dir(self) -> Path:
        """Folder of the anchor, which the first stage that needs it makes from data and CF model."""
        return self.path / "anchor"

    def record_path(self, step: Step) -> Path:
        """Record, whose existence marks the step as done."""
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
            raise ArtifactError(f"{path} is not a step record: run the step '{step}' again with --force")
        return record

    def is_done(self, step: Step) -> bool:
        """Whether the step's record exists, with any fingerprint."""
        return self.record_path(step).exists()

    def withdraw(self, step: Step) -> None:
        """Delete a step's record before its files change.

        A step that is linked from another run is unlinked, since the other run's files must not change.
        """
        folder = self.step_dir(step)
        if folder.is_symlink():
            folder.unlink()
        self.record_path(step).unlink(missing_ok=True)
