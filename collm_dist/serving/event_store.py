"""Store of events that arrived after the log of the served run: SQLite in a folder of its own.

    store = EventStore("events")
    store.add([Event("click-1", user="u17", item="B004", time=1_767_225_600)])
    collm_dist.load_recommender("runs/mine", events=store).rank(user="u17")

An event is on the disk before ``add`` returns, and counts once, however often its id is sent. What arrived leaves the
store as Parquet parts, each event in exactly one, which the next run reads together with its log. Several processes of
one machine may open the same store; only the part of it that they read is in memory.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from collm_dist.data.ingest.id_forms import drop_fractions
from collm_dist.data.ingest.normalize import FIRST_SECOND
from collm_dist.errors import ArtifactError, DiskError, RequestError
from collm_dist.serving.event_parts import list_missing_parts, write_part_file
from collm_dist.serving.received_event import Event, check_events, is_text

logger = logging.getLogger(__name__)

FILE_NAME, PARTS_FOLDER = "events.sqlite", "parquet"
# Events of a user that a request reads, the latest; and events that one call of ``read`` summarizes.
MAX_USER_EVENTS, _WINDOW = 10_000, 100_000
MAX_PART_ROWS = 200_000
_BUSY_SECONDS = 60.0
_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL UNIQUE, user TEXT NOT NULL, item TEXT NOT NULL,
    time INTEGER NOT NULL, label INTEGER NOT NULL, received INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS events_by_user ON events (user, time);
CREATE INDEX IF NOT EXISTS events_by_item ON events (item, time);
CREATE TABLE IF NOT EXISTS parts (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    columns TEXT NOT NULL, is_written INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT OR IGNORE INTO facts VALUES ('store', '{store}');
COMMIT;
"""

# Numbers of events, first and last, that a run's log already holds.
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Added:
    """Number of events that ``EventStore.add`` stored, and of those that were there already."""

    stored: int
    duplicates: int


@dataclass(frozen=True)
class Changes:
    """What ``EventStore.read`` found.

    Attributes:
        users: (item, time, label) of each asked user's events, in the order of their times.
        items: likes and events of each item among the events after ``since``.
        last: number of the last event that ``items`` counts.
        end: first second after those events.
        is_complete: whether there are no events after ``last``.
        forgotten: number of times that users have been forgotten.
    """

    users: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)
    items: dict[str, tuple[int, int]] = field(default_factory=dict)
    last: int = 0
    end: int = FIRST_SECOND
    is_complete: bool = True
    forgotten: int = 0


class EventStore:
    """Events in ``events.sqlite`` of a folder, and their Parquet parts in its folder ``parquet``. It is thread-safe."""

    def __init__(self, folder: Path | str) -> None:
        """Open the store, make it if there is none, and finish parts that a killed process left unwritten.

        Raises:
            ArtifactError: the file is damaged.
            DiskError: it cannot be written.
        """
        self.folder = Path(folder)
        self.parts_folder = self.folder / PARTS_FOLDER
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        with self._explaining():
            self.parts_folder.mkdir(parents=True, exist_ok=True)
            self._writer, self._reader = self._connect(), self._connect()
            self._writer.executescript(_SCHEMA.format(store=uuid.uuid4().hex[:12]))
            self.store_id = str(self._writer.execute("SELECT value FROM facts WHERE name = 'store'").fetchone()[0])
        try:
            self._finish_parts()
        except (DiskError, OSError) as error:  # written with the next parts; events and answers do not wait for it
            logger.error("%s: %s", self.folder, error)

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(
            self.folder / FILE_NAME, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA secure_delete = ON")
        return database

    def close(self) -> None:
        """Close the files."""
        self._writer.close()
        self._reader.close()

    def add(self, events: Sequence[Event]) -> Added:
        """Store a batch: all of it, or nothing if an event is refused. It is on the disk when this returns.

        Raises:
            RequestError: an event is not valid, or its id was used for another event; the message names it.
            DiskError: the store cannot be written.
        """
        check_events(events)
        now, stored = int(time.time()), 0
        with self._writing() as database:
            for index, event in enumerate(events):
                row = (event.user, event.item, event.time, event.label)
                known = database.execute(
                    "SELECT user, item, time, label FROM events WHERE event_id = ?", (event.event_id,)
                ).fetchone()
                if known is None:
                    database.execute(
                        "INSERT INTO events (event_id, user, item, time, label, received) VALUES (?, ?, ?, ?, ?, ?)",
                        (event.event_id, *row, now),
                    )
                    stored += 1
                elif known != row:
                    raise RequestError(
                        f"events.{index}.event_id: {event.event_id!a} was received before with another user, item, "
                        "time or label; give every event an id of its own"
                    )
        return Added(stored, len(events) - stored)

    def read(self, users: Iterable[str], since: int = 0, ranges: Ranges = ()) -> Changes:
        """Return the events of users, and what has been added for all items since an earlier call.

        Args:
            users: raw ids.
            since: ``last`` of the earlier call.
            ranges: events to leave out.

        Raises:
            ArtifactError: the file is damaged.
        """
        rest, bounds = _leave_out(ranges)
        with self._reading() as database:
            (newest,) = database.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()
            last = min(newest, since + _WINDOW)
            counts = database.execute(
                "SELECT item, SUM(label), COUNT(*), MAX(time) FROM events "  # noqa: S608 - the parts are constants
                f"WHERE seq > ? AND seq <= ?{rest} GROUP BY item",
                (since, last, *bounds),
            ).fetchall()
            forgotten = database.execute("SELECT value FROM facts WHERE name = 'forgotten'").fetchone()
            found = {user: self._read_user(database, user, rest, bounds) for user in dict.fromkeys(users)}
        return Changes(
            users=found,
            items={item: (likes, rows) for item, likes, rows, _ in counts},
            last=max(last, since),
            end=max((latest + 1 for *_, latest in counts), default=FIRST_SECOND),
            is_complete=last >= newest,
            forgotten=0 if forgotten is None else int(forgotten[0]),
        )

    def _read_user(
        self, database: sqlite3.Connection, user: str, rest: str, bounds: list[int]
    ) -> list[tuple[str, int, int]]:
        if not is_text(user):  # no such user can have been stored
            return []
        rows = database.execute(
            f"SELECT item, time, label FROM events WHERE user = ?{rest} ORDER BY time DESC, seq DESC LIMIT ?",  # noqa: S608
            (user, *bounds, MAX_USER_EVENTS),
        ).fetchall()
        return rows[::-1]

    def count_items(self, items: Iterable[str], before: int, ranges: Ranges = ()) -> dict[str, tuple[int, int]]:
        """Return the likes and events of items strictly before a time (seconds since 1970); items without any are
        left out.

        Raises:
            ArtifactError: the file is damaged.
        """
        rest, bounds = _leave_out(ranges)
        counts = {}
        with self._reading() as database:
            for item in items:
                likes, rows = database.execute(
                    f"SELECT SUM(label), COUNT(*) FROM events WHERE item = ? AND time < ?{rest}",  # noqa: S608
                    (item, before, *bounds),
                ).fetchone()
                if rows:
                    counts[item] = (likes, rows)
        return counts

    def write_parts(self, columns: Mapping[str, Any]) -> list[Path]:
        """Write all events that are in no part yet to Parquet parts, and return the new files.

        Args:
            columns: see ``event_parts.describe_columns``.

        Raises:
            DiskError: a file cannot be written; its events will be in the part of this name once it can.
        """
        written: list[Path] = []
        while True:
            with self._writing() as database:
                first = database.execute("SELECT COALESCE(MAX(last), 0) + 1 FROM parts").fetchone()[0]
                last, rows = database.execute(
                    "SELECT MAX(seq), COUNT(*) FROM (SELECT seq FROM events WHERE seq >= ? ORDER BY seq LIMIT ?)",
                    (first, MAX_PART_ROWS),
                ).fetchone()
                if rows:
                    number = database.execute("SELECT COALESCE(MAX(number), 0) + 1 FROM parts").fetchone()[0]
                    name = f"part-{number:06d}-{self.store_id}.parquet"
                    database.execute(
                        "INSERT INTO parts VALUES (?, ?, ?, ?, ?, 0)", (number, name, first, last, json.dumps(columns))
                    )
            # The range is decided before the file exists, so that a kill in between cannot put an event in two parts.
            self._finish_parts()
            if not rows:
                return written
            written.append(self.parts_folder / name)

    def _finish_parts(self) -> None:
        with self._reading() as database:
            waiting = database.execute(
                "SELECT number, name, first, last, columns FROM parts WHERE is_written = 0"
            ).fetchall()
        for number, name, first, last, columns in waiting:
            with self._reading() as database:
                rows = database.execute(
                    "SELECT user, item, time, label FROM events WHERE seq BETWEEN ? AND ? ORDER BY seq", (first, last)
                ).fetchall()
            write_part_file(self.parts_folder / name, rows, json.loads(columns))
            with self._writing() as database:
                database.execute("UPDATE parts SET is_written = 1 WHERE number = ?", (number,))

    def count_waiting(self) -> tuple[int, int]:
        """Return the number of events that are in no part, and when the first of them arrived (seconds since 1970)."""
        with self._reading() as database:
            rows, received = database.execute(
                "SELECT COUNT(*), COALESCE(MIN(received), 0) FROM events "
                "WHERE seq > (SELECT COALESCE(MAX(last), 0) FROM parts)"
            ).fetchone()
        return rows, received

    def find_ranges(self, names: Iterable[str]) -> Ranges:
        """Return the events that a run's log holds: those of the parts that it has read, by file name, and of parts
        that were removed from the folder since.
        """
        read = set(names)
        with self._reading() as database:
            parts = database.execute(
                "SELECT name, first, last FROM parts WHERE is_written = 1 ORDER BY first"
            ).fetchall()
        gone = list_missing_parts(self.parts_folder, [name for name, _, _ in parts])
        ranges: list[tuple[int, int]] = []
        for name, first, last in parts:
            if name not in read and name not in gone:
                continue
            if ranges and ranges[-1][1] + 1 == first:
                ranges[-1] = (ranges[-1][0], last)
            else:
                ranges.append((first, last))
        return tuple(ranges)

    def prune(self, ranges: Ranges, received_before: int) -> int:
        """Delete events in ranges that arrived before a time (seconds since 1970), and return their number.

        Their ids are forgotten: an event that is sent again after that is stored again.
        """
        deleted = 0
        with self._writing() as database:
            for first, last in ranges:
                deleted += database.execute(
                    "DELETE FROM events WHERE seq BETWEEN ? AND ? AND received < ?", (first, last, received_before)
                ).rowcount
        return deleted

    def forget(self, users: Iterable[str], *, apply: bool = True) -> int:
        """Delete all events of users from the store, not from its parts, and return their number.

        Args:
            users: raw ids; 17 also stands for 17.0.
            apply: False = only count them.
        """
        count, listed = 0, set(users)
        with self._writing() as database:
            stored = [user for (user,) in database.execute("SELECT DISTINCT user FROM events")]
            unified = drop_fractions(pa.array(stored, pa.string())).to_pylist()
            for user in (user for user, plain in zip(stored, unified, strict=True) if {user, plain} & listed):
                count += database.execute("SELECT COUNT(*) FROM events WHERE user = ?", (user,)).fetchone()[0]
                if apply:
                    database.execute("DELETE FROM events WHERE user = ?", (user,))
            if apply:
                database.execute(
                    "INSERT INTO facts VALUES ('forgotten', '1') "
                    "ON CONFLICT (name) DO UPDATE SET value = CAST(value AS INTEGER) + 1"
                )
        if apply:  # also from free pages of the file and from its log
            with self._write_lock, self._explaining():
                (is_busy, *_) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if is_busy:
                raise DiskError(
                    f"{self.folder / FILE_NAME}: the events are deleted, but another program that reads the file keeps "
                    "their bytes on the disk; end it, then run the same command again"
                )
        return count

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Hold a transaction, which is durable at the end of the block and undone by an error."""
        with self._write_lock, self._explaining():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Read in one state of the store."""
        with self._read_lock, self._explaining():
            self._reader.execute("BEGIN")
            try:
                yield self._reader
            finally:
                self._reader.execute("COMMIT")

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        path = self.folder / FILE_NAME
        try:
            yield
        except sqlite3.OperationalError as error:  # full or read-only disk, no permission, locked for a minute
            raise DiskError(
                f"{path} cannot be used: {error}; make space or allow writing there, and keep the folder on a disk of "
                "this machine"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ArtifactError(
                f"{path} is damaged ({error}); restore it from a copy, or move the folder away to start an empty store"
            ) from error
        except OSError as error:
            raise DiskError(f"{error.filename or path} cannot be written: {error.strerror or error}") from error


def _leave_out(ranges: Ranges) -> tuple[str, list[int]]:
    """Return SQL that leaves ranges of events out, and its parameters."""
    return " AND NOT seq BETWEEN ? AND ?" * len(ranges), [bound for bounds in ranges for bound in bounds]
