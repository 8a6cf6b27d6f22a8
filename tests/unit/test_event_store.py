"""The store of fresh events: what is sent counts once, in the order of its times, and leaves in exactly one part."""

import sqlite3
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collm_dist.config import ColumnsConfig, DatasetConfig
from collm_dist.data.ingest.id_forms import IdIndex
from collm_dist.data.ingest.source import open_source
from collm_dist.errors import ArtifactError, DataError, DiskError, RequestError
from collm_dist.serving import event_store
from collm_dist.serving.event_log import EventLog
from collm_dist.serving.event_parts import describe_columns
from collm_dist.serving.event_store import Event, EventStore
from collm_dist.serving.fresh_events import FreshEvents
from collm_dist.serving.requests import RankingRequest, RequestReader

COLUMNS = describe_columns(DatasetConfig(path="log.csv", columns=ColumnsConfig(label="liked")))
ITEMS = ["a", "b", "c", "d"]

events_of_few = st.builds(
    Event,
    event_id=st.integers(0, 40).map(str),
    user=st.sampled_from(["u", "v", "w"]),
    item=st.sampled_from([*ITEMS, "unknown"]),
    time=st.integers(-5, 20),
    label=st.integers(0, 1),
)


def read_parts(store):
    """Return the rows of all parts, in the order of their names."""
    tables = [pq.read_table(path) for path in sorted(store.parts_folder.glob("*.parquet"))]
    columns = ("user_id", "item_id", "timestamp", "liked")
    return [
        (row["user_id"], row["item_id"], int(row["timestamp"].timestamp()), row["liked"])
        for table in tables
        for row in table.select(columns).to_pylist()
    ]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.lists(events_of_few, max_size=8), st.sampled_from(["part", "reopen"])), max_size=8))
def test_a_store_is_a_dictionary_by_event_id(tmp_path_factory, actions):
    """Any sequence of batches, parts and restarts leaves what a dictionary would hold."""
    folder = tmp_path_factory.mktemp("store")
    store, expected = EventStore(folder), {}
    for action in actions:
        if action == "part":
            store.write_parts(COLUMNS)
        elif action == "reopen":
            store.close()
            store = EventStore(folder)
        else:
            merged = dict(expected)
            is_valid = all(merged.setdefault(event.event_id, event) == event for event in action)
            if is_valid:
                added = store.add(action)
                assert (added.stored, added.stored + added.duplicates) == (len(merged) - len(expected), len(action))
                expected = merged
            else:
                with pytest.raises(RequestError, match=r"was received before with another"):
                    store.add(action)
    found = store.read(["u", "v", "w", "nobody", "\ud800"])
    for user, rows in found.users.items():
        own = [(event.item, event.time, event.label) for event in expected.values() if event.user == user]
        assert rows == sorted(own, key=lambda row: row[1])  # stable: events of one second in the order of arrival
    for item in [*ITEMS, "unknown"]:
        labels = [event.label for event in expected.values() if event.item == item]
        assert found.items.get(item, (0, 0)) == (sum(labels), len(labels))
        before = [event.label for event in expected.values() if event.item == item and event.time < 7]
        assert store.count_items([item], 7).get(item, (0, 0)) == (sum(before), len(before))
    store.write_parts(COLUMNS)
    assert read_parts(store) == [
        (event.user, event.item, event.time, event.label) for event in expected.values()
    ]  # each once, in the order of arrival
    assert store.write_parts(COLUMNS) == []
    store.close()


@pytest.fixture
def log_of_kinds(tmp_path):
    """Settings of a log with columns that parts of events lack, and of a part beside it."""
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,timestamp,rating,kind,fold\nu,a,1,5,sale,train\nu,b,2,2,sale,valid\nv,a,3,5,view,test\n"
    )
    columns = ColumnsConfig(rating="rating", split="fold")
    dataset = DatasetConfig(path=str(tmp_path / "log.csv"), columns=columns, new_events=str(tmp_path / "parquet"))
    store = EventStore(tmp_path)
    store.add([Event("1", "w", "c", 4, 1), Event("2", "w", "d", 5, 0)])
    store.write_parts(describe_columns(dataset))
    return dataset


@pytest.mark.parametrize(
    ("row_filter", "items", "shown"),
    [
        ("kind == 'sale'", ["a", "b", "c", "d"], ["parts of dataset.new_events have no kind, so dataset.row_filter"]),
        ("kind == 'sale' and rating > 3", ["a", "c", "d"], ["parts of dataset.new_events have no kind"]),
        ("rating > 3", ["a", "a", "c"], []),
    ],
)
def test_a_filter_on_a_column_that_parts_lack_keeps_their_rows(log_of_kinds, row_filter, items, shown):
    source = open_source(log_of_kinds.model_copy(update={"row_filter": row_filter}))
    batches = [batch for chunk in source.chunks for batch in source.read_chunk(chunk)]
    assert [item for batch in batches for item in batch.table.column("item_id").to_pylist()] == items
    assert [guess[: len(text)] for guess, text in zip(source.list_guesses(), shown, strict=True)] == shown
    assert sum(batch.rows_read for batch in batches) == 5


def test_parts_are_refused_by_a_split_of_the_log(log_of_kinds):
    split = log_of_kinds.split.model_copy(update={"method": "column"})
    with pytest.raises(
        DataError, match=r"part-000001-\w+\.parquet: events have no column 'fold' .*to ratio or calendar"
    ):
        open_source(log_of_kinds.model_copy(update={"split": split}))


def test_a_part_without_a_column_is_named_with_its_own_setting(log_of_kinds):
    folder = Path(log_of_kinds.new_events)
    pq.write_table(pa.table({"user_id": ["w"], "item_id": ["c"], "timestamp": [6]}), folder / "later.parquet")
    source = open_source(log_of_kinds)
    (chunk,) = [chunk for chunk in source.chunks if chunk.uri.endswith("later.parquet")]
    with pytest.raises(DataError, match=r"later\.parquet.*'rating'.*leave this file out \(dataset\.new_events may"):
        list(source.read_chunk(chunk))


def test_changes_come_in_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(event_store, "_WINDOW", 3)
    store = EventStore(tmp_path)
    store.add([Event(str(number), "u", ITEMS[number % 2], number) for number in range(8)])
    last, counts = 0, {}
    for is_complete in (False, False, True):
        changes = store.read([], last)
        last, counts = (
            changes.last,
            counts | {item: counts.get(item, 0) + rows for item, (_, rows) in changes.items.items()},
        )
        assert changes.is_complete == is_complete
    assert (last, counts, changes.end) == (8, {"a": 4, "b": 4}, 8)
    assert store.read(["u"], last).items == {}


def test_parts_that_a_run_has_read_no_longer_count(tmp_path):
    store = EventStore(tmp_path)
    names = []
    for number in range(3):
        store.add([Event(f"{number}-{copy}", "u", ITEMS[number], 10 * number + copy) for copy in range(2)])
        names += [path.name for path in store.write_parts(COLUMNS)]
    store.add([Event("late", "u", "d", 99)])
    assert store.find_ranges(["another.csv"]) == ()
    assert store.find_ranges(names[:2]) == ((1, 4),)
    ranges = store.find_ranges([names[0], names[2]])
    assert ranges == ((1, 2), (5, 6))
    assert [item for item, _, _ in store.read(["u"], ranges=ranges).users["u"]] == ["b", "b", "d"]
    assert store.read([], ranges=ranges).items == {"b": (2, 2), "d": (1, 1)}
    # A part that was merged into the log and removed.
    (store.parts_folder / names[1]).unlink()
    assert store.find_ranges([names[2]]) == ((3, 6),)
    assert store.prune(ranges, received_before=2**60) == 4
    assert [item for item, _, _ in store.read(["u"]).users["u"]] == ["b", "b", "d"]
    assert store.add([Event("late", "u", "d", 99)]).duplicates == 1


def test_a_part_that_a_kill_left_unwritten_is_written_at_the_next_start(tmp_path, monkeypatch):
    store = EventStore(tmp_path)
    store.add([Event("1", "u", "a", 1), Event("2", "v", "b", 2)])

    def die(*arguments):
        raise SystemExit

    def fail(*arguments):
        raise DiskError("the disk is full")

    monkeypatch.setattr(event_store, "write_part_file", die)
    with pytest.raises(SystemExit):
        store.write_parts(COLUMNS)
    monkeypatch.undo()
    store.add([Event("3", "w", "c", 3)])
    store.close()
    monkeypatch.setattr(event_store, "write_part_file", fail)
    store = EventStore(tmp_path)  # answers do not wait for space on the disk
    store.add([Event("4", "x", "d", 4)])
    with pytest.raises(DiskError):
        store.write_parts(COLUMNS)
    store.close()
    monkeypatch.undo()
    store = EventStore(tmp_path)
    assert read_parts(store) == [("u", "a", 1, 1), ("v", "b", 2, 1), ("w", "c", 3, 1), ("x", "d", 4, 1)]
    assert store.write_parts(COLUMNS) == []


def test_events_of_forgotten_users_leave_the_disk(tmp_path):
    store = EventStore(tmp_path)
    store.add(
        [Event(f"{user}-{number}", user, "a", number) for user in ("forgotten-user", "7.0", "v") for number in range(3)]
    )
    assert store.forget(["forgotten-user", "nobody", "7"], apply=False) == 6
    assert store.forget(["forgotten-user", "nobody", "7"]) == 6
    assert store.read([]).items == {"a": (3, 3)}
    store.close()
    assert not any(b"forgotten-user" in path.read_bytes() for path in tmp_path.glob("events*"))


def test_bytes_that_another_reader_keeps_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(event_store, "_BUSY_SECONDS", 0.1)
    store = EventStore(tmp_path)
    store.add([Event("1", "forgotten-user", "a", 1)])
    reader = sqlite3.connect(tmp_path / "events.sqlite", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM events").fetchall()
    with pytest.raises(DiskError, match=r"another program that reads the file .*run the same command again"):
        store.forget(["forgotten-user"])
    reader.close()
    assert store.forget(["forgotten-user"]) == 0
    store.close()
    assert not any(b"forgotten-user" in path.read_bytes() for path in tmp_path.glob("events*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"event_id": ""}, r"events\.1\.event_id: '' is not an id"),
        ({"user": "\ud800"}, r"events\.1\.user: '\\ud800' is not an id"),
        ({"user": 7}, r"events\.1\.user: 7 is not an id"),
        ({"user": "a\nb"}, r"events\.1\.user: 'a\\nb' is read as a missing value in a log, or has control characters"),
        ({"item": "null"}, r"events\.1\.item: 'null' is read as a missing value"),
        ({"item": " 17"}, r"events\.1\.item: ' 17' would be read as '17' in a log"),
        ({"time": 1.5}, r"events\.1\.time: 1\.5 is not an integer"),
        ({"time": 1_767_225_600_000}, r"events\.1\.time: 1767225600000 is outside .* not milliseconds"),
        ({"label": 2}, r"events\.1\.label: 2 is neither 1, a like, nor 0"),
    ],
)
def test_events_that_no_log_could_hold_are_refused(tmp_path, changes, message):
    store = EventStore(tmp_path)
    good = {"event_id": "2", "user": "u", "item": "a", "time": 5}
    with pytest.raises(RequestError, match=message):
        store.add([Event("1", "u", "a", 5), Event(**good | changes)])
    assert store.count_waiting()[0] == 0  # all or nothing


def test_a_damaged_store_is_named(tmp_path):
    EventStore(tmp_path).close()
    for path in tmp_path.glob("events.sqlite*"):
        path.write_bytes(b"not a database, but long enough to have a header" * 100)
    with pytest.raises(ArtifactError, match=r"events\.sqlite is damaged"):
        EventStore(tmp_path)


def make_log(rows):
    """Return a log of (user, item, time, label) rows."""
    rows = sorted(rows, key=lambda row: (row[0], row[2]))
    users, items, times, labels = np.array(rows, np.int64).reshape(-1, 4).T
    return EventLog(users, items, times, labels.astype(np.int8), num_users=3, num_items=len(ITEMS))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 9), st.integers(0, 1)), min_size=1),
    st.lists(events_of_few, max_size=12, unique_by=lambda event: event.event_id),
    st.none() | st.integers(-2, 25),
)
def test_a_log_with_fresh_events_is_a_longer_log(tmp_path_factory, rows, events, as_of):
    """Contexts and counts are those of a log that holds the events, and every user sees only their own history."""
    store = EventStore(tmp_path_factory.mktemp("store"))
    store.add(events)
    users, items = IdIndex("uvw"), IdIndex(ITEMS)
    fresh = FreshEvents(store, ITEMS, items, read_parts=(), duplicates="keep")
    known = [event for event in events if event.item in items]
    more = [(users[event.user], items[event.item], event.time, event.label) for event in known]
    limits = {"max_history_length": 5, "max_dislikes": 3, "every_event_is_a_like": False}
    reader = RequestReader(users, items, make_log(rows), fresh=fresh, **limits)
    expected = RequestReader(users, items, make_log(rows + more), **limits)
    requests = [RankingRequest(user, as_of=as_of) for user in users]
    if as_of is None and len(known) < len(events):
        requests = []  # events of unknown items move the end of all events, and count nowhere
    for request in requests:
        with reader.reading([request]):
            ours = reader.build_block([reader.read_user(request)], [np.arange(4)])
        theirs = expected.build_block([expected.read_user(request)], [np.arange(4)])
        for name, values in vars(theirs).items():
            if isinstance(values, np.ndarray):
                assert np.array_equal(getattr(ours, name), values), name
    store.close()


@pytest.mark.parametrize(("duplicates", "labels"), [("keep", [0, 1, 0, 1]), ("first", [0, 1]), ("collapse", [1, 1])])
def test_repeated_events_follow_the_rule_of_the_log(tmp_path, duplicates, labels):
    store = EventStore(tmp_path)
    store.add([Event("1", "u", "a", 20, 0), Event("2", "u", "a", 30, 1)])
    fresh = FreshEvents(store, ITEMS, {"a": 0, "b": 1}, read_parts=(), duplicates=duplicates)
    logged = np.array([5, 6]), np.array([0, 1]), np.array([0, 1], np.int8)
    with fresh.reading(["u"]):
        _, items, found = fresh.add_user_events("u", 100, logged)
    assert found.tolist() == labels
    assert items.tolist()[:2] == [0, 1]
