"""Reuse of finished steps of other runs, by symbolic links."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collm_dist.errors import ConfigError
from collm_dist.runs.file_hashes import check_files
from collm_dist.runs.fingerprints import find_changes
from collm_dist.runs.run_dir import RunDir, Step


def find_reusable(step: Step, fingerprint: Mapping[str, Any], runs: Sequence[str]) -> RunDir | None:
    """Return the first run in which the step is done with this fingerprint, or None.

    Raises:
        ConfigError: a run is not a directory.
        ArtifactError: a file of the step is missing or damaged.
    """
    for name in runs:
        run_dir = RunDir(Path(name))
        if not run_dir.path.is_dir():
            raise ConfigError(f"run.reuse: no run directory '{name}'")
        if run_dir.is_done(step) and not find_changes(run_dir.read_record(step).get("fingerprint", {}), fingerprint):
            check_files(run_dir, step, keep=True)
            return run_dir
    return None


def link_step(step: Step, source: RunDir, target: RunDir) -> None:
    """Replace a step's folder, possibly incomplete, with a link to the step of another run."""
    folder = target.step_dir(step)
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    origin = source.step_dir(step).resolve()
    folder.symlink_to(os.path.relpath(origin, folder.parent.resolve()), target_is_directory=True)
