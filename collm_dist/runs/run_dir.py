"""The run directory: where each step writes, and when it counts as done.

A step is done when its record (manifest.json or summary.json) exists and its fingerprint equals today's. The record is
written last, by rename, so a half-written step has none.
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
