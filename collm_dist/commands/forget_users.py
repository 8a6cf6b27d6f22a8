"""Remove runs with given users: ``python launch/forget_users.py --users users.parquet --runs runs/* [--apply]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from collm_dist.cli import run_reporting
from collm_dist.errors import ArtifactError

if TYPE_CHECKING:
    from collm_dist.serving.event_store import EventStore

DESCRIPTION = """List the run directories that hold users who must be forgotten, and remove these runs with --apply.
A run made without these users (dataset.forget) is kept. If it reuses stage 1 of a removed run, it gets a copy of the
weights."""
EXAMPLES = """examples:
  python launch/forget_users.py --users forget.csv --runs runs/*              list runs that hold them
  python launch/forget_users.py --users forget.csv --runs runs/* --apply      remove these runs
"""


def _run(arguments: argparse.Namespace) -> None:
    import pyarrow as pa

    from collm_dist.data.ingest.forgotten_users import load_forgotten
    from collm_dist.data.ingest.id_forms import drop_fractions
    from collm_dist.data.shards.interactions import load_known_users
    from collm_dist.runs.user_deletion import choose_runs, find_held_users, remove_leftovers, remove_runs

    def load_ids(data_dir: Path) -> list[str]:  # as in the list
        return [str(user) for user in drop_fractions(pa.array(load_known_users(data_dir), pa.string())).to_pylist()]

    paths, skipped = choose_runs(arguments.runs) if arguments.runs else ([], [])
    store = None if arguments.events is None else _open_store(arguments.events)
    users = load_forgotten(arguments.users, "--users")
    runs = find_held_users(paths, users, load_ids)
    print("\n".join(skipped), end="\n" * bool(skipped))
    for run in runs:
        count = "unknown: its data step is unfinished" if run.count is None else f"{run.count:,} listed users"
        print(f"{run.path}: {count}")
    if arguments.apply:
        for path in remove_runs(runs):
            print(f"removed {path}")
        remove_leftovers(arguments.runs)
    events = 0 if store is None else _forget_events(store, users.to_pylist(), arguments.apply)
    for run in runs:
        if run.count and run.published_to is not None:
            print(f"also published, remove it there yourself: {run.path.name} in {run.published_to}")
    if not arguments.apply and (events or any(run.count for run in runs)):
        print("--apply removes the runs that hold listed users" + ", and these events" * bool(events))


def _open_store(folder: Path) -> EventStore:
    from collm_dist.serving.event_store import FILE_NAME, EventStore

    if not (folder / FILE_NAME).exists():  # opening would make one
        raise ArtifactError(
            f"--events {folder}: the folder has no event store; give the folder of the service's --events"
        )
    return EventStore(folder)


def _forget_events(store: EventStore, users: list[str], apply: bool) -> int:
    count = store.forget(users, apply=apply)
    done = (
        " removed; if the service is running, restart it: its item counts still include them" if apply and count else ""
    )
    print(f"{store.folder}: {count:,} events of listed users{done}")
    if parts := len(list(store.parts_folder.glob("*.parquet"))):
        print(
            f"{store.folder}: {parts} parts are files of the log; remove the rows there, or name the list in "
            "dataset.forget"
        )
    store.close()
    return count


def main() -> int:
    """Run the command and return its exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EXAMPLES, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--users", required=True, metavar="URI", help="Parquet or CSV with a column user_id")
    parser.add_argument("--runs", default=[], nargs="+", type=Path, metavar="R", help="run directories, all of them")
    parser.add_argument("--events", type=Path, metavar="DIR", help="store of the service's events, to remove theirs")
    parser.add_argument(
        "--apply",
        action="store_true",
        help="remove the runs, and with --events the events; by default they are only listed",
    )
    try:
        arguments = parser.parse_args()
        if not arguments.runs and arguments.events is None:
            parser.error("name --runs, --events or both")
    except SystemExit as stop:  # argparse has printed the help or the error
        return int(stop.code or 0)
    return run_reporting(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
