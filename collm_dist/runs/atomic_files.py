"""Atomic file writes, explained disk errors, and content hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collm_dist.errors import ArtifactError, CollmError, DiskError, Preempted


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
            set_file_mode(Path(name))
            Path(name).replace(path)
            _sync(path.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def clear_unfinished(*folders: Path) -> Iterator[None]:
    """Delete the temporary files below folders if the block is stopped: killed worker processes leave them."""
    try:
        yield
    except (KeyboardInterrupt, Preempted):
        for folder in folders:
            for path in () if folder.is_symlink() else folder.rglob(".*.tmp"):  # a link leads to another run
                path.unlink(missing_ok=True)
        raise


def set_file_mode(path: Path) -> None:
    """Give a file the mode of new files; ``mkstemp`` and safetensors make it 0600, unreadable to other accounts."""
    path.chmod(0o666 & ~_UMASK)


def _read_umask() -> int:
    """Return the umask, which can only be read by setting it: once, before other threads make files."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


_UMASK = _read_umask()


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
    """Fsync all files below a folder and give them the mode of new files, for libraries that do not."""
    for path in (folder, *folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            set_file_mode(path)
        _sync(path)


_HASHED_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


# Something else is in the place of a file or folder.
_IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP}


@contextmanager
def explain_disk_errors(path: Path, size_bytes: int | None = None) -> Iterator[None]:
    """Raise DiskError if the block cannot write because the disk is full or writing is not allowed.

    If a directory is in the place of a file, or a file in that of a directory, raise ArtifactError.

    Args:
        path: file, or folder of the files, that the block writes.
        size_bytes: expected size in bytes, if known.
    """
    try:
        yield
    except CollmError:
        raise
    except Exception as error:
        code = _find_errno(error)
        named = _find_named(error)
        related = (
            named is None or named in (path, *path.parents) or path in named.parents or named.parent == path.parent
        )
        if code in _IN_THE_WAY and related:
            raise ArtifactError(
                f"{named or path}: {os.strerror(code or 0)}; move the existing file or folder away, then run the same "
                "command again"
            ) from error
        if code not in _FULL and not (code in _FORBIDDEN and related):
            raise
        needed = "" if size_bytes is None else f", {size_bytes / 2**20:,.1f} MiB needed"
        remedy = "make space there" if code in _FULL else "allow writing there, or choose another directory"
        raise DiskError(
            f"{named or path} cannot be written: {os.strerror(code or 0)} ({_describe_free(named or path)}{needed}); "
            f"{remedy}, then run the same command again. Files that were complete before are unchanged"
        ) from error


def _find_named(error: Exception) -> Path | None:
    """Return the path that an error of the system names; of a rename, the new name."""
    name = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None


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


def compute_file_hash(path: Path, on_read: Callable[[int], object] = lambda _: None) -> str:
    """Return the SHA-256 of a file, in hexadecimal; ``on_read`` is called with each number of bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED_BYTES):
            digest.update(block)
            on_read(len(block))
    return digest.hexdigest()


def compute_json_hash(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
