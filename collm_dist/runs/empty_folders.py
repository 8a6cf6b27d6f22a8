"""Removal of empty folders that a failed command would leave."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def list_missing(folder: Path) -> list[Path]:
    """Return the folder and its parents as far as they do not exist, the deepest first."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists() or path.is_symlink():
            break
        missing.append(path)
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that are empty, in the given order; others stay."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def remove_empty_below(folder: Path) -> None:
    """Remove all empty folders below a folder, and those that become empty by it."""
    found = [Path(parent) for parent, _, _ in os.walk(folder)]
    remove_empty(reversed(found[1:]))
