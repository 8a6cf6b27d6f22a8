"""Earlier runs that still hold users who are to be forgotten: finding them, and removing them whole.

A run is a chain of checksums over tables, shards, vectors and weights that were made from its users' rows; taking some
rows out of it leaves neither a run nor a proof. So a run that holds such users is kept or removed, nothing between.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.config.yaml_document import parse_yaml
from collm_dist.errors import ArtifactError, CollmError
from collm_dist.runs.atomic_files import explain_disk_errors
from collm_dist.runs.lock import hold_run_lock

# What stage 1 takes over from another run: weights, no rows.
_WEIGHTS = ("stage1/adapter", "stage1/merged")
_REMOVED = ".removed-"


@dataclass(frozen=True)
class HeldUsers:
    """What a run holds of the users on a list.

    Attributes:
        path: of the run.
        count: how many of them are in its id table; None = its data step did not end, so nobody knows.
        published_to: where its settings say that it was published.
    """

    path: Path
    count: int | None
    published_to: str | None = None


def find_held_users(
    runs: Iterable[Path], forgotten: Any, load_user_ids: Callable[[Path], list[str]]
) -> list[HeldUsers]:
    """Look users up in the id tables of runs.

    Args:
        runs: run directories; what is none is passed over, and so are links to runs.
        forgotten: ids, an Arrow array of text.
        load_user_ids: returns the id table of a data folder.
    """
    runs_held = []
    for path in runs:
        if path.is_symlink() or not (path / "data").is_dir():
            continue
        settings = path / "config.yaml"
        document = (parse_yaml(settings.read_text(encoding="utf-8")) if settings.exists() else None) or {}
        published_to = (document.get("run") or {}).get("publish_to")
        try:
            count = int(pc.is_in(pa.array(load_user_ids(path / "data"), pa.string()), forgotten).to_numpy(False).sum())
        except CollmError:
            runs_held.append(HeldUsers(path, None, published_to))
        else:
            runs_held.append(HeldUsers(path, count, published_to))
    return runs_held


def remove_runs(held: Sequence[HeldUsers]) -> list[Path]:
    """Remove the runs that hold users, whole; runs that took stage 1 from one of them get its weights as their own.

    Nothing is changed before all of them have been looked at.

    Args:
        held: of all runs that may lead to one another by links.

    Returns:
        The runs that are gone.

    Raises:
        ArtifactError: one is in use: a link beside it or in a run that stays leads to it, or its state is unknown.
        LaunchError: one is being written.
    """
    unknown = [run.path for run in held if run.count is None]
    if unknown:
        raise ArtifactError(f"{unknown[0]}: its data step did not end or is damaged, so nobody knows whom it holds: "
                            "finish it or remove it by hand, then run the same command again")  # fmt: skip
    targets = [run.path for run in held if run.count]
    staying = [run.path for run in held if not run.count]
    links = [link for path in staying for link in _find_links(path) if _leads_into(link, targets)]
    _check_links(links, targets, staying)
    with ExitStack() as locks:
        for path in targets:
            locks.enter_context(hold_run_lock(path))
        for link in links:
            with explain_disk_errors(link):
                _copy_link_target(link)
    for path in targets:  # the name goes first: a run that is half there must not be taken for one
        path.rename(path.with_name(f"{_REMOVED}{path.name}"))
    for folder in {run.path.absolute().parent for run in held}:
        for leftover in folder.glob(f"{_REMOVED}*"):
            shutil.rmtree(leftover)
    return targets


def _find_links(run: Path) -> Iterator[Path]:
    for path in (*run.iterdir(), *run.glob("*/*")):
        if path.is_symlink():
            yield path


def _leads_into(link: Path, targets: Sequence[Path]) -> bool:
    end = link.resolve()
    return any(end.is_relative_to(target.resolve()) for target in targets)


def _check_links(links: Sequence[Path], targets: Sequence[Path], staying: Sequence[Path]) -> None:
    for link in links:
        if not link.as_posix().endswith(_WEIGHTS):
            raise ArtifactError(f"{link} leads to {link.resolve()}, which would be removed: name this run too, or redo "
                                "its step")  # fmt: skip
    known = {path.resolve() for path in (*targets, *staying)}
    for folder in {path.absolute().parent for path in targets}:
        for entry in folder.iterdir():
            if entry.is_symlink() and _leads_into(entry, targets):
                raise ArtifactError(
                    f"{entry} leads to {entry.resolve()}, which is in use: let a run without these users take its "
                    "place first (dataset.forget), or remove the link"
                )
            if entry.is_dir() and entry.resolve() not in known:
                for link in _find_links(entry):
                    if _leads_into(link, targets):
                        raise ArtifactError(f"{link} leads to {link.resolve()}, which would be removed: name {entry} "
                                            "among the runs too")  # fmt: skip


def _copy_link_target(link: Path) -> None:
    """Put a copy of what a link leads to in its place."""
    copy = link.with_name(f".{link.name}.{os.getpid()}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(link.resolve(), copy)
    link.unlink()
    copy.rename(link)
