"""Removal of empty folders that a failed command would leave."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
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


def list_names(folder: Path) -> set[str]:
    """Return the names in a folder; none if it does not exist."""
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def remove_new_empty(folder: Path, before: Collection[str]) -> None:
    """Remove the new empty folders of a folder, and those that become empty by it.

    Args:
        folder: the folder.
        before: names in it that are old; nothing below them is removed.
    """
    for entry in folder.iterdir():
        if entry.name not in before and entry.is_dir() and not entry.is_symlink():  # a link leads to others' folders
            remove_empty(Path(parent) for parent, _, _ in os.walk(entry, topdown=False))
