"""Boundary around the loading of an artifact: any error of a library becomes an ArtifactError with the file's name."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collm_dist.errors import ArtifactError, CollmError, DataError


@contextmanager
def name_damage(path: Path, remedy: str) -> Iterator[None]:
    """Turn an error of the block into an ArtifactError that names the file or folder; lack of memory stays as it is.

    Args:
        path: file or folder that the block reads.
        remedy: end of the message.
    """
    try:
        yield
    except DataError as error:  # a folder of ours, loaded as if it were a user's
        raise ArtifactError(f"{path} is damaged or missing ({error}); {remedy}") from error
    except (CollmError, MemoryError):
        raise
    except Exception as error:  # tokenizers raise plain exceptions, safetensors and pyarrow their own
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"{path} is damaged or missing ({reason}); {remedy}") from error


_UNREADABLE = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}


@contextmanager
def explain_read_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the system into an ArtifactError if the block cannot read a file of a folder that it names."""
    try:
        yield
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        is_read = named is not None and (not named.exists() or named.is_dir() or not os.access(named, os.R_OK))
        if error.errno not in _UNREADABLE or named is None or not is_read or folder not in named.parents:
            raise
        raise ArtifactError(
            f"{named} cannot be read ({error.strerror}): allow reading it, restore it from a copy, or redo its step "
            "with --force"
        ) from error


def read_json_file(path: Path, *names: str, remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        names: keys that it must have.
        remedy: end of the message.

    Raises:
        ArtifactError: the file is missing, is not a JSON object, or lacks a key.
    """
    with name_damage(path, remedy):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or (missing := [name for name in names if name not in record]):
            raise ValueError(
                f"it lacks {', '.join(missing)}" if isinstance(record, dict) else "it is not a JSON object"
            )
        return record
