"""Atomic file writes, explained disk errors, and content hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collm_dist.errors import DiskError


@contextmanager
def open_atomic(path: Path, mode: str = "w", size_bytes: int | None = None) -> Iterator[Any]:
    """Open a temporary file next to ``path``; rename it to ``path`` after an fsync, or delete it on an error.

    Args:
        path: the file; an existing file stays until the end of the block.
        mode: w or wb.
        size_bytes: expected size for error messages, if known.

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
            Path(name).chmod(0o644)  # mkstemp's 0600 would hide the file from other users
            Path(name).replace(path)
            _sync(path.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _sync(path: Path) -> None:
    """Fsync a file or a folder; without the folder, a power failure may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without fsync
            raise
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Fsync all files below a folder, for libraries that do not."""
    for path in (folder, *folder.rglob("*")):
        _sync(path)


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def explain_disk_errors(path: Path, size_bytes: int | None = None) -> Iterator[None]:
    """Raise DiskError if the block cannot write because the disk is full or writing is not allowed.

    Args:
        path: file, or folder of the files, that the block writes.
        size_bytes: expected size in bytes, if known.
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
            f"{remedy}, then run the same command again. Files that were complete before are unchanged"
        ) from error


def _find_errno(error: Exception) -> int | None:
    """Return the system's error number, which libraries written in Rust have only in their message."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def _describe_free(path: Path) -> str:
    folder = next((parent for parent in (path, *path.parents) if parent.exists()), None)
    return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB free" if folder else "free space unknown"


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. NaN is refused because it is not JSON."""
    with open_atomic(path) as file:
        json.dump(value, file, indent=2, sort_keys=True, allow_nan=False)
        file.write("\n")


def compute_file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compute_json_hash(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
