"""Error file: how the processes of a step report to their parent why they failed."""

from __future__ import annotations

import json
import os
from pathlib import Path

from collm_dist.errors import CollmError, WorkerLostError
from collm_dist.runs.atomic_files import write_json

# The parent sets this variable to the path of the file.
ERROR_FILE_VARIABLE = "COLLM_ERROR_FILE"


def write_error(error: CollmError) -> None:
    """Write an error to the parent's error file, if there is a parent.

    The first error of a job stays. Only a ``WorkerLostError``, the consequence of another process's error, is replaced.
    """
    if ERROR_FILE_VARIABLE not in os.environ:
        return
    path = Path(os.environ[ERROR_FILE_VARIABLE])
    earlier = read_error(path)
    is_cause = isinstance(earlier, WorkerLostError) and not isinstance(error, WorkerLostError)
    if earlier is None or is_cause:
        write_json(path, error.to_dict())


def read_error(path: Path) -> CollmError | None:
    """Return the error in an error file; None without a file."""
    return CollmError.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
