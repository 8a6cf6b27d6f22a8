"""Removal of earlier runs that hold users to be forgotten.

A run is a chain of checksums over tables, shards, vectors and weights that derive from its users' rows. Without some of
the rows it would be neither a consistent run nor a proof of deletion, so runs are removed as a whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.config.yaml_file import get_text, read_yaml
from collm_dist.errors import ArtifactError, CollmError, DataError
from collm_dist.runs.atomic_files import explain_disk_errors, sync_files
from collm_dist.runs.lock import hold_run_lock
from collm_dist.runs.run_dir import RunDir

# Parts of stage 1 that a run may link from another run: weights without rows.
_WEIGHTS = ("stage1/adapter", "stage1/merged", "stage1/anchored_score.safetensors")
_REMOVED = ".removed-"


@dataclass(frozen=True)
class HeldUsers:
    """Number of listed users in a run.

    Attributes:
        path: run directory.
        count: listed users in the run's id table; None if its data step did not finish, so the number is unknown.
        published_to: ``run.publish_to`` of the run.
    """

    path: Path
    count: int | None
    published_to: str | None = None


def choose_runs(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Return the run directories among paths, and a line on each path that is skipped.

    Raises:
        DataError: a path does not exist, or none of them is a run directory. A path whose removal was interrupted is
            skipped: ``remove_leftovers`` finishes it.
    """
    runs, skipped, unfinished = [], [], False
    for path in paths:
        if path.is_symlink():
            skipped.append(f"{path}: skipped, a link to {path.resolve()}")
        elif path.with_name(f"{_REMOVED}{path.name}").exists() and not path.exists():
            skipped.append(f"{path}: its removal was interrupted, and --apply finishes it")
            unfinished = True
        elif not path.exists():
            raise DataError(f"--runs: {path} does not exist; name existing run directories")
        elif not (path / "data").is_dir():
            skipped.append(f"{path}: skipped, not a run directory (it has no folder data)")
        else:
            runs.append(path)
    if not runs and not unfinished:
        raise DataError("--runs: none of these is a run directory:\n  " + "\n  ".join(skipped))
    return runs, skipped


def find_held_users(
    runs: Iterable[Path], forgotten: Any, load_user_ids: Callable[[Path], list[str]]
) -> list[HeldUsers]:
    """Look users up in the id tables of runs.

    Args:
        runs: run directories, see ``choose_runs``.
        forgotten: user ids, an Arrow array of strings.
        load_user_ids: function that returns the id table of a data folder.

    Raises:
        ConfigError: a run's config.yaml is damaged, so that it does not say where the run was published.
    """
    runs_held = []
    for path in runs:
        settings = path / "config.yaml"
        published_to = get_text(read_yaml(settings), "run", "publish_to") if settings.exists() else None
        try:
            count = int(pc.is_in(pa.array(load_user_ids(path / "data"), pa.string()), forgotten).to_numpy(False).sum())
        except CollmError:
            runs_held.append(HeldUsers(path, None, published_to))
        else:
            runs_held.append(HeldUsers(path, count, published_to))
    return runs_held


def remove_runs(held: Sequence[HeldUsers]) -> list[Path]:
    """Remove the runs that hold listed users; runs that linked their stage 1 get a copy of its weights.

    All checks precede the first change.

    Args:
        held: all runs that may link to one another.

    Returns:
        The removed runs.

    Raises:
        ArtifactError: a run is in use (a link next to it, or in a run that stays, leads to it) or its state is unknown.
        LaunchError: a run is being written.
    """
    unknown = [run.path for run in held if run.count is None]
    if unknown:
        raise ArtifactError(f"{unknown[0]}: its data step is unfinished or damaged, so its users are unknown: "
                            "finish it or remove it by hand, then run the same command again")  # fmt: skip
    targets = [run.path for run in held if run.count]
    staying = [run.path for run in held if not run.count]
    links = [link for path in staying for link in _find_links(path) if _leads_into(link, targets)]
    _check_links(links, targets, staying)
    with ExitStack() as locks:
        for path in targets:
            locks.enter_context(hold_run_lock(path))
        for path in staying:
            _finish_copies(path)
        for link in links:
            with explain_disk_errors(link):
                _copy_link_target(link)
    for path in targets:  # rename first: an incomplete run must not look like a run
        path.rename(path.with_name(f"{_REMOVED}{path.name}"))
    remove_leftovers(run.path for run in held)
    return targets


def remove_leftovers(runs: Iterable[Path]) -> None:
    """Delete the renamed folders of removed runs in the parent folders of ``runs``, also after an interruption."""
    for folder in {path.absolute().parent for path in runs}:
        for leftover in folder.glob(f"{_REMOVED}*"):
            shutil.rmtree(leftover)


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
                    f"{entry} leads to {entry.resolve()}, which is in use: replace it with a run without these users "
                    "first (dataset.forget), or remove the link"
                )
            if entry.is_dir() and entry.resolve() not in known:
                for link in _find_links(entry):
                    if _leads_into(link, targets):
                        raise ArtifactError(f"{link} leads to {link.resolve()}, which would be removed: name {entry} "
                                            "among the runs too")  # fmt: skip


def _copy_link_target(link: Path) -> None:
    """Replace a link with a copy of its target, a file or a folder."""
    copy = _get_copy_path(link)
    if link.is_file():
        shutil.copy2(link, copy)
        sync_files(copy)
        copy.replace(link)
        return
    shutil.copytree(link.resolve(), copy)
    sync_files(copy)
    link.unlink()  # no folder replaces a link; _finish_copies does what is left if this process ends here
    copy.rename(link)


def _finish_copies(run: Path) -> None:
    """Put copies in place whose link was removed by a call that then ended, and delete those that are incomplete."""
    for name in _WEIGHTS:
        path = run / name
        copy = _get_copy_path(path)
        is_missing = not path.exists() and not path.is_symlink()
        # Without its record stage 1 is being redone, and makes its own weights.
        if copy.is_dir() and is_missing and RunDir(run).is_done("stage1"):
            copy.rename(path)
        elif copy.is_dir():
            shutil.rmtree(copy)
        else:
            copy.unlink(missing_ok=True)


def _get_copy_path(link: Path) -> Path:
    return link.with_name(f".{link.name}.copy")
