"""Delta and Iceberg tables as inputs: versions, partitions, added columns, deleted rows, refusals."""

from __future__ import annotations

import builtins
import datetime
import json
import os
import sys
import uuid
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.types import DoubleType

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.source import open_source
from collm_dist.data.ingest.user_texts import open_user_file
from collm_dist.errors import CollmError, ConfigError, DataError
from tests.lakehouse import add_deletion_vector, create_iceberg_table, delete_beside, describe_catalog, write_commit

CLICKS = {"feedback": "implicit", "columns": {"timestamp": None}}
EVENTS = pa.table({"user_id": [1, 2, 3, 4], "item_id": list("abcd"), "day": list("xyxy")})
MORE = pa.table({"user_id": [5, 6], "item_id": list("ef"), "day": ["x", "a b/%"], "price": [1.5, None]})


def read(**dataset) -> tuple[list[tuple[str, str]], Mapping]:
    """Return user and item of all rows, as workers read them, and counts of bad rows."""
    source = open_source(DatasetConfig.model_validate({**CLICKS, **dataset}))
    rows, bad = [], {}
    for chunk in source.split_chunks(source.inputs()):
        for batch in source.for_workers().read_chunk(chunk):
            rows += zip(*(batch.table.column(name).to_pylist() for name in ("user_id", "item_id")), strict=True)
            bad |= batch.bad
    return rows, bad


@pytest.fixture(scope="module")
def delta(tmp_path_factory) -> str:
    """Version 0: four rows in two partitions; 1: two more with a new column; 2: without user 1."""
    folder = tmp_path_factory.mktemp("delta") / "events"
    write_deltalake(folder, EVENTS, partition_by=["day"])
    write_deltalake(folder, MORE, mode="append", schema_mode="merge")
    DeltaTable(folder).delete("user_id = 1")
    return str(folder)


@pytest.fixture(scope="module")
def iceberg(tmp_path_factory):
    """Snapshots as the versions of ``delta``; the column day is then called date."""
    table = create_iceberg_table(tmp_path_factory.mktemp("iceberg"), EVENTS.schema)
    table.append(EVENTS)
    with table.update_schema() as schema:
        schema.add_column("price", DoubleType())
    table.append(MORE)
    table.delete("user_id == 1")
    with table.update_schema() as schema:
        schema.rename_column("day", "date")
    table.append(pa.table({"user_id": [7], "item_id": ["g"], "date": ["x"], "price": [2.5]}))
    return table


def in_catalog(table) -> dict:
    return {"format": "iceberg", "path": "shop.events", "catalog": describe_catalog(Path(table.location()).parents[1])}


@pytest.fixture
def catalog_of(iceberg) -> dict:
    return {"catalog": describe_catalog(Path(iceberg.location().removeprefix("file://")).parents[1])}


def test_a_version_of_a_delta_table(delta):
    assert sorted(read(format="delta", path=delta, version=0)[0]) == [("1", "a"), ("2", "b"), ("3", "c"), ("4", "d")]
    assert sorted(read(format="delta", path=delta, version=1)[0]) == [(str(n), "abcdef"[n - 1]) for n in range(1, 7)]
    newest, bad = read(format="delta", path=delta)
    assert (sorted(newest), bad) == ([(str(n), "abcdef"[n - 1]) for n in range(2, 7)], {})
    assert read(format="delta", path=delta, row_filter="day == 'a b/%'")[0] == [("6", "f")]
    assert read(format="delta", path=delta, row_filter="price > 1")[0] == [("5", "e")]


def test_a_delta_table_names_its_version(delta):
    source = open_source(DatasetConfig.model_validate({**CLICKS, "format": "delta", "path": delta, "version": 1}))
    table_id = str(DeltaTable(delta).metadata().id)
    assert source.describe_inputs() == {"dataset.path": {"table": "delta", "table_id": table_id, "version": 1}}
    assert source.list_guesses() == [f"{delta} (Delta table, version 1); the newest is 2"]
    assert source.describe()["dataset.path"] == f"{delta} (Delta table, version 1)"


def test_rows_of_a_deletion_vector_are_not_read(tmp_path):
    write_deltalake(tmp_path / "t", EVENTS)
    write_deltalake(tmp_path / "t", MORE.drop(["price"]), mode="append")
    add_deletion_vector(tmp_path / "t", 2, [1, 2])
    rows, _ = read(format="delta", path=str(tmp_path / "t"))
    assert sorted(rows) == [("1", "a"), ("4", "d"), ("5", "e"), ("6", "f")]
    assert len(read(format="delta", path=str(tmp_path / "t"), version=1)[0]) == 6


def test_a_row_keeps_its_number_beside_deleted_rows(tmp_path):
    write_deltalake(tmp_path / "t", pa.table({"user_id": ["1", None, "3", None], "item_id": list("abcd")}))
    add_deletion_vector(tmp_path / "t", 1, [1])
    source = open_source(DatasetConfig.model_validate({**CLICKS, "format": "delta", "path": str(tmp_path / "t")}))
    (batch,) = source.read_chunk(source.chunks[0])
    assert batch.bad_examples == [f"{source.chunks[0].uri}:4: missing user_id (empty)"]


@pytest.mark.parametrize("mode", ["name", "id"])
def test_columns_of_a_delta_table_may_have_other_names_in_its_files(tmp_path, mode):
    pq.write_table(pa.table({"c1": pa.array([1, 2], pa.int32()), "c2": ["a", "b"]}), tmp_path / "part.parquet")
    fields = [
        {"name": name, "type": kind, "nullable": True,
         "metadata": {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": f"c{number}"}}
        for number, (name, kind) in enumerate([("user_id", "long"), ("item_id", "string"), ("day", "date")], 1)
    ]  # fmt: skip
    settings = {"delta.columnMapping.mode": mode, "delta.columnMapping.maxColumnId": "3"}
    schema = json.dumps({"type": "struct", "fields": fields})
    write_commit(tmp_path, 0, [
        {"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}},
        {"metaData": {"id": "x", "format": {"provider": "parquet", "options": {}}, "schemaString": schema,
                      "partitionColumns": ["day"], "configuration": settings, "createdTime": 1}},
        {"add": {"path": "part.parquet", "partitionValues": {"c3": "2024-02-01"}, "modificationTime": 1,
                 "size": (tmp_path / "part.parquet").stat().st_size, "dataChange": True}},
    ])  # fmt: skip
    rows, _ = read(format="delta", path=str(tmp_path), columns={"timestamp": "day"})
    assert rows == [("1", "a"), ("2", "b")]


def test_large_files_of_a_delta_table_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("collm_dist.data.ingest.file_chunks.PART_BYTES", 10)
    monkeypatch.setattr("collm_dist.data.ingest.file_chunks.ROW_GROUPS_PER_CHUNK", 1)
    log = pa.table({"user_id": list(range(50)), "item_id": ["i"] * 50})
    write_deltalake(tmp_path / "t", log)
    file = DeltaTable(tmp_path / "t").file_uris()[0]
    pq.write_table(log, file, row_group_size=20)
    add = json.loads((tmp_path / "t/_delta_log/00000000000000000000.json").read_text().splitlines()[-1])
    assert add["add"]["path"] in file
    add_deletion_vector(tmp_path / "t", 1, [0, 25])
    source = open_source(DatasetConfig.model_validate({**CLICKS, "format": "delta", "path": str(tmp_path / "t")}))
    assert [chunk.row_groups for chunk in source.chunks] == [(0, 1), (1, 2), (2, 3)]
    rows, _ = read(format="delta", path=str(tmp_path / "t"))
    assert [int(user) for user, _ in rows] == [number for number in range(50) if number not in (0, 25)]


def test_a_snapshot_of_an_iceberg_table(iceberg, catalog_of):
    table = {"format": "iceberg", "path": "shop.events", **catalog_of}
    first, second, third, _ = [one.snapshot_id for one in iceberg.metadata.snapshots]
    assert read(**table, snapshot_id=first)[0] == [("1", "a"), ("2", "b"), ("3", "c"), ("4", "d")]
    assert len(read(**table, snapshot_id=second, row_filter="day == 'x'")[0]) == 3
    assert len(read(**table, snapshot_id=third)[0]) == 5
    assert sorted(read(**table)[0]) == [(str(n), "abcdefg"[n - 1]) for n in range(2, 8)]
    assert sorted(read(**table, row_filter="date == 'x' and price > 1")[0]) == [("5", "e"), ("7", "g")]
    source = open_source(DatasetConfig.model_validate({**CLICKS, **table, "snapshot_id": second}))
    entry = {"table": "iceberg", "table_id": str(iceberg.metadata.table_uuid), "snapshot_id": second}
    assert source.describe_inputs() == {"dataset.path": entry}


def test_an_iceberg_table_without_a_catalog(iceberg, tmp_path):
    metadata = iceberg.metadata_location.removeprefix("file://")
    assert len(read(format="iceberg", path=metadata)[0]) == 6
    folder = tmp_path / "table"
    (folder / "metadata").mkdir(parents=True)
    (folder / "metadata/v3.metadata.json").write_bytes(Path(metadata).read_bytes())
    with pytest.raises(DataError, match=r"no metadata/version-hint\.text"):
        read(format="iceberg", path=str(folder))
    (folder / "metadata/version-hint.text").write_text("3")
    assert len(read(format="iceberg", path=str(folder))[0]) == 6


def test_rows_of_position_deletes_are_not_read_and_equality_deletes_are_refused(tmp_path):
    table = create_iceberg_table(tmp_path, EVENTS.schema)
    table.append(EVENTS)
    (file,) = [task.file.file_path for task in table.scan().plan_files()]
    rows = pa.table({"file_path": [file, file], "pos": pa.array([1, 3], pa.int64())})
    delete_beside(table, "POSITION_DELETES", rows, [2147483546, 2147483545])
    settings = {"format": "iceberg", "path": "shop.events", "catalog": describe_catalog(tmp_path)}
    assert read(**settings)[0] == [("1", "a"), ("3", "c")]
    delete_beside(table, "EQUALITY_DELETES", pa.table({"user_id": pa.array([3], pa.int64())}), [1])
    with pytest.raises(DataError, match=r"equality deletes.*rewrite_data_files"):
        read(**settings)


def test_a_table_names_no_code(tmp_path, monkeypatch):
    """``py-io-impl`` and ``s3.retry-strategy-impl`` of a table would be imported and called."""
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    table = create_iceberg_table(tmp_path / "lake", EVENTS.schema)
    table.append(EVENTS)
    location = Path(table.metadata_location.removeprefix("file://"))
    metadata = json.loads(location.read_text())
    metadata["properties"] |= {"py-io-impl": "planted.Io", "s3.retry-strategy-impl": "planted.Retry"}
    location.write_text(json.dumps(metadata))
    assert len(read(format="iceberg", path=str(location))[0]) == 4
    catalog = describe_catalog(tmp_path / "lake")
    assert len(read(format="iceberg", path="shop.events", catalog=catalog)[0]) == 4
    assert "planted" not in sys.modules


def test_a_catalog_server_names_no_code(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    metadata = create_iceberg_table(tmp_path / "lake", EVENTS.schema)
    metadata.append(EVENTS)
    impl = {"py-io-impl": "planted.Io", "auth": {"type": "custom", "impl": "planted.Auth", "custom": {}}}
    loaded = {
        "metadata-location": metadata.metadata_location,
        "metadata": json.loads(Path(metadata.metadata_location.removeprefix("file://")).read_text()),
        "config": {"py-io-impl": "planted.Io"},
    }

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            answer = loaded if self.path.endswith("/events") else {"defaults": impl, "overrides": impl}
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        catalog = {"type": "rest", "uri": f"http://127.0.0.1:{server.server_port}"}
        rows, _ = read(format="iceberg", path="shop.events", catalog=catalog)
        server.shutdown()
    assert len(rows) == 4
    assert "planted" not in sys.modules


def test_uuids_are_read_as_text(tmp_path):
    users = [uuid.UUID(int=1), uuid.UUID(int=2)]
    schema = pa.schema([("user_id", pa.uuid()), ("item_id", pa.string())])
    table = create_iceberg_table(tmp_path, schema)
    table.append(pa.Table.from_pydict({"user_id": [user.bytes for user in users], "item_id": ["a", "b"]}, schema))
    rows, _ = read(format="iceberg", path="shop.events", catalog=describe_catalog(tmp_path))
    assert [user for user, _ in rows] == [str(user) for user in users]


def test_items_and_users_may_be_tables(delta, tmp_path):
    write_deltalake(tmp_path / "items", pa.table({"item_id": ["a"], "title": ["One"]}))
    write_deltalake(tmp_path / "items", pa.table({"item_id": ["b"], "title": ["Two"]}), mode="append")
    users = create_iceberg_table(tmp_path / "users", pa.schema([("user_id", pa.int64()), ("age", pa.int32())]))
    users.append(pa.table({"user_id": [1], "age": pa.array([40], pa.int32())}))
    dataset = DatasetConfig.model_validate({
        **CLICKS, "format": "delta", "path": delta, "items_path": str(tmp_path / "items"), "item_version": 0,
        "users_path": "shop.events", "user_text": "{age}", "catalog": describe_catalog(tmp_path / "users"),
    })  # fmt: skip
    source = open_source(dataset)
    assert source.read_items().table.column("title").to_pylist() == ["One"]
    assert source.describe_inputs()["dataset.items_path"]["version"] == 0
    file = open_user_file(dataset)
    assert file.read(pa.array(["1"])).texts == {"1": "40"}
    assert file.inputs()["dataset.users_path"]["snapshot_id"] == users.metadata.current_snapshot_id
    plain = DatasetConfig.model_validate({**CLICKS, "path": str(tmp_path / "log.csv"),
                                          "items_path": str(tmp_path / "items")})  # fmt: skip
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,a\n")
    assert open_source(plain).read_items().table.num_rows == 2


def test_times_of_tables(tmp_path):
    times = [datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC)]
    log = pa.table({"user_id": [1, 2], "item_id": ["a", "b"], "timestamp": pa.array(times, pa.timestamp("us", "UTC"))})
    write_deltalake(tmp_path / "t", log)
    table = create_iceberg_table(tmp_path / "i", log.schema)
    table.append(log)
    delta = {"format": "delta", "path": str(tmp_path / "t")}
    for settings in (delta, {"format": "iceberg", "path": "shop.events", "catalog": describe_catalog(tmp_path / "i")}):
        source = open_source(DatasetConfig.model_validate({"feedback": "implicit", **settings}))
        (batch,) = source.read_chunk(source.chunks[0])
        assert batch.table.column("timestamp").to_pylist() == [int(time.timestamp()) for time in times]


REFUSED = {
    "no such folder": ({"format": "delta", "path": "{lake}/none"}, "is not a Delta table: it does not exist"),
    "no table": ({"format": "delta", "path": "{lake}"}, "has no folder _delta_log"),
    "version": ({"format": "delta", "path": "{delta}", "version": 9}, "has no version 9; the newest is 2"),
    "column": (
        {"format": "delta", "path": "{delta}", "columns": {"user_id": "user", "timestamp": None}},
        "there is no column 'user' .*did you mean 'user_id'.*dataset.columns.user_id",
    ),
    "as files": ({"path": "{delta}"}, "holds a Delta table.*set dataset.format to delta"),
    "as a glob": ({"path": "{delta}/*.parquet"}, "holds a Delta table"),
    "new events": ({"path": "{log}", "new_events": "{delta}"}, "dataset.new_events: .*holds a Delta table"),
    "Iceberg as files": ({"path": "{iceberg}"}, "holds an Iceberg table.*set dataset.format to iceberg"),
    "snapshot": ({"format": "iceberg", "path": "{metadata}", "snapshot_id": 5}, "has no snapshot 5; it may have"),
    "Iceberg column": (
        {"format": "iceberg", "path": "{metadata}", "columns": {"item_id": "item", "timestamp": None}},
        "there is no column 'item'",
    ),
    "no such table": (
        {"format": "iceberg", "path": "shop.clicks", "catalog": "{catalog}"}, "'test' has no such table; check",
    ),
    "catalog": ({"format": "iceberg", "path": "shop.events"}, "the catalog cannot be opened: URI missing"),
    "no metadata": ({"format": "iceberg", "path": "{lake}/x.metadata.json"}, "x.metadata.json is missing"),
    "version of files": (
        {"path": "{log}", "items_path": "{log}", "item_version": 1}, "item_version is set, but .* is not a Delta table",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_place_and_remedy(name, delta, iceberg, catalog_of, tmp_path, monkeypatch):
    monkeypatch.setenv("PYICEBERG_HOME", str(tmp_path))
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,a\n")
    places = {
        "lake": tmp_path, "delta": delta, "log": tmp_path / "log.csv",
        "iceberg": iceberg.location().removeprefix("file://"),
        "metadata": iceberg.metadata_location.removeprefix("file://"),
    }  # fmt: skip
    settings, message = REFUSED[name]
    filled = {
        key: value.format(**places, catalog="") if isinstance(value, str) else value for key, value in settings.items()
    }
    if "catalog" in settings:
        filled |= catalog_of
    with pytest.raises(CollmError, match=message) as error:
        read(**filled)
    assert error.value.exit_code == 2


def test_a_version_needs_its_format():
    for name, kind in (("version", "delta"), ("snapshot_id", "iceberg")):
        with pytest.raises(ValueError, match=f"{name} is for format: {kind}"):
            DatasetConfig.model_validate({**CLICKS, "path": "log.csv", name: 1})
    with pytest.raises(ValueError, match="credentials"):
        DatasetConfig.model_validate({**CLICKS, "path": "a.b", "catalog": {"uri": "postgresql://me:secret@host/db"}})


def test_files_that_vacuum_removed_are_named(tmp_path):
    write_deltalake(tmp_path / "t", EVENTS)
    source = open_source(DatasetConfig.model_validate({**CLICKS, "format": "delta", "path": str(tmp_path / "t")}))
    Path(source.chunks[0].uri).unlink()
    with pytest.raises(DataError, match=r"\(Delta table, version 0\).*\n.*VACUUM.*choose a newer version"):
        list(source.read_chunk(source.chunks[0]))


def test_unknown_features_of_a_delta_table_are_refused(delta, tmp_path):
    write_deltalake(tmp_path / "t", EVENTS)
    features = ["deletionVectors", "typeWidening", "variantType"]
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": features, "writerFeatures": features}
    write_commit(tmp_path / "t", 1, [{"protocol": protocol}])
    with pytest.raises(DataError, match="needs variantType, which cannot be read here: drop the feature"):
        read(format="delta", path=str(tmp_path / "t"))


@pytest.mark.parametrize("library", ["deltalake", "pyiceberg"])
def test_a_missing_library_is_named(library, delta, iceberg, catalog_of, monkeypatch):
    plain_import = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.split(".")[0] == library:
            raise ImportError(name)
        return plain_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    table = {"delta": delta} if library == "deltalake" else {"iceberg": "shop.events"}
    ((kind, path),) = table.items()
    with pytest.raises(ConfigError, match=rf"needs the library {library}: pip install 'collm-dist\[{kind}\]'"):
        read(format=kind, path=path, **({} if kind == "delta" else catalog_of))


def test_reading_creates_no_catalog(tmp_path):
    catalog = {"type": "sql", "uri": f"sqlite:///{tmp_path}/none/catalog.db"}
    with pytest.raises(DataError, match="cannot be read as an Iceberg table"):
        read(format="iceberg", path="shop.events", catalog=catalog)
    assert not os.listdir(tmp_path)  # noqa: PTH208
