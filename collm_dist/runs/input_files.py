"""Identity of input files in fingerprints: their content, so that a copy is the same file.

An entry is ``{"sha256", "size", "mtime_ns"}``; only the hash counts. Size and time serve to compare with entries
without a hash: of objects in a store, which would have to be read for it, and of release 0.1, also as
``[size, mtime_ns]``. Hashes are cached by path, size and time in the cache folder of this account.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from collm_dist.assets import get_cache_dir
from collm_dist.errors import CollmError, DataError
from collm_dist.runs.atomic_files import compute_file_hash, open_atomic
from collm_dist.storage import find_local_path

_BLOCK_BYTES = 64 << 20


def describe_inputs(states: Mapping[str, Mapping[str, Any]], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a step's input files. Local files are read in parallel, and only if they are not known.

    Args:
        states: size and modification time by URI, as ``storage.describe_files`` returns them; or other entries, such as
            the version of a table, which are kept as they are.
        recorded: the step's fingerprint in its record, in which names begin with ``input.``; empty if it is not done.

    Raises:
        DataError: a file cannot be read.
    """
    entries: dict[str, Any] = {}
    for uri, state in states.items():
        old = recorded.get(f"input.{uri}")
        if isinstance(old, dict) and {name: old.get(name) for name in state} == state:
            entries[uri] = old
        elif "size" in state and (path := find_local_path(uri)) is not None:
            entries[uri] = describe_file(path, _hash_blocks)
        else:
            entries[uri] = dict(state)
    return entries


def _hash_blocks(path: Path) -> str:
    """Return the SHA-256 of the hashes of a file's blocks. Threads compute them, so large logs take little time."""
    starts = range(0, max(path.stat().st_size, 1), _BLOCK_BYTES)
    with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as threads:
        digests = threads.map(lambda start: _hash_block(path, start), starts)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _hash_block(path: Path, start: int) -> bytes:
    digest, left = hashlib.sha256(), _BLOCK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (data := file.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
    return digest.digest()


def describe_file(path: Path, compute_hash: Callable[[Path], str] = compute_file_hash) -> dict[str, Any]:
    """Return the entry of a file.

    Args:
        path: the file.
        compute_hash: function of the file's content.

    Raises:
        DataError: it cannot be read.
    """
    try:
        status = path.stat()
        state = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        cache = get_cache_dir() / "file-hashes" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
        if (known := _read(cache)) is not None and known == state | {"sha256": known.get("sha256")}:
            return known
        entry = state | {"sha256": compute_hash(path)}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    with suppress(OSError, CollmError), open_atomic(cache) as file:  # without a cache it is read each time
        json.dump(entry, file)
    return entry


def is_same_input(recorded: Any, current: Any) -> bool:
    """Return whether two values of fingerprints are equal, or entries of files with equal content.

    An entry without a hash equals one with its size and modification time.
    """
    if recorded == current:
        return True
    if _is_entry(recorded) and _is_entry(current):
        return bool(recorded["sha256"] == current["sha256"])
    for old, new in ((recorded, current), (current, recorded)):
        if _is_entry(new):
            state = {"size": new["size"], "mtime_ns": new["mtime_ns"]}
            return old in (state, list(state.values()))
    return False


def keep_old_entries(inputs: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a step with the entries of release 0.1 in place of the newer ones that they equal.

    Args:
        inputs: by name.
        recorded: a fingerprint of the same run, in which names begin with ``input.``.
    """
    old = {name: recorded.get(f"input.{name}") for name in inputs}
    return {
        name: old[name] if isinstance(old[name], list) and is_same_input(old[name], value) else value
        for name, value in inputs.items()
    }


def drop_times(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint with the hash alone of each file, for keys made from it."""
    return {name: value["sha256"] if _is_entry(value) else value for name, value in fingerprint.items()}


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"sha256", "size", "mtime_ns"}


def _read(cache: Path) -> dict[str, Any] | None:
    try:
        entry = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return entry if _is_entry(entry) and isinstance(entry["sha256"], str) and len(entry["sha256"]) == 64 else None
