"""Small Delta and Iceberg tables, also with deletions as other engines write them beside the data files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def add_deletion_vector(folder: Path, version: int, rows: list[int]) -> None:
    """Commit a version in which these rows of the first file of version 0 are deleted, in the log alone."""
    roaring = struct.pack("<II", 12346, 1) + struct.pack("<HHI", 0, len(rows) - 1, 16)
    roaring += struct.pack(f"<{len(rows)}H", *rows)
    vector = struct.pack("<IQI", 1681511377, 1, 0) + roaring
    padded = vector + b"\0" * (-len(vector) % 4)
    text = "".join(_Z85[number // 85**place % 85] for (number,) in struct.iter_unpack(">I", padded)
                   for place in (4, 3, 2, 1, 0))  # fmt: skip
    add = next(line["add"] for line in _read_commit(folder, 0) if "add" in line)
    features = ["deletionVectors"]
    described = {"storageType": "i", "pathOrInlineDv": text, "sizeInBytes": len(vector), "cardinality": len(rows)}
    commit = [
        {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": features,
                      "writerFeatures": features}},
        {"remove": {"path": add["path"], "deletionTimestamp": 1, "dataChange": True}},
        {"add": {name: value for name, value in add.items() if value is not None} | {"deletionVector": described}},
    ]  # fmt: skip
    write_commit(folder, version, commit)


def write_commit(folder: Path, version: int, actions: list[dict]) -> None:
    path = folder / "_delta_log" / f"{version:020}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(action) for action in actions))


def _read_commit(folder: Path, version: int) -> list[dict]:
    path = folder / "_delta_log" / f"{version:020}.json"
    return [json.loads(line) for line in path.read_text().splitlines()]


def describe_catalog(folder: Path) -> dict[str, str]:
    """Return the settings of an SQL catalog in a folder."""
    return {"name": "test", "type": "sql", "uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"file://{folder}"}


def create_iceberg_table(folder: Path, schema: pa.Schema, **properties: str):
    """Return an empty table ``shop.events`` of a new catalog."""
    from pyiceberg.catalog import load_catalog

    folder.mkdir(parents=True, exist_ok=True)
    settings = describe_catalog(folder)
    catalog = load_catalog(settings.pop("name"), **settings)
    catalog.create_namespace_if_not_exists("shop")
    return catalog.create_table("shop.events", schema=schema, properties={"format-version": "2", **properties})


def delete_beside(table, content: str, rows: pa.Table, field_ids: list[int]) -> None:
    """Commit a snapshot with a delete file, which pyiceberg itself does not write.

    Args:
        table: an unpartitioned Iceberg table.
        content: POSITION_DELETES or EQUALITY_DELETES.
        rows: of the delete file.
        field_ids: of its columns.
    """
    from pyiceberg.manifest import DataFile, DataFileContent, FileFormat, ManifestContent, ManifestWriterV2
    from pyiceberg.table.snapshots import Operation
    from pyiceberg.table.update.snapshot import _FastAppendFiles
    from pyiceberg.typedef import Record

    class DeleteManifestWriter(ManifestWriterV2):
        def content(self):
            return ManifestContent.DELETES

        @property
        def _meta(self):
            return {**super()._meta, "content": "deletes"}

    class RowDelta(_FastAppendFiles):
        def new_manifest_writer(self, spec):
            schema = self._transaction.table_metadata.schema()
            return DeleteManifestWriter(spec, schema, self.new_manifest_output(), self._snapshot_id, self._compression)

    path = f"{table.location()}/data/deletes-{table.metadata.last_sequence_number}.parquet"
    fields = [field.with_metadata({"PARQUET:field_id": str(number)})
              for field, number in zip(rows.schema, field_ids, strict=True)]  # fmt: skip
    local = Path(path.removeprefix("file://"))
    pq.write_table(rows.cast(pa.schema(fields)), local)
    file = DataFile.from_args(
        content=DataFileContent[content], file_path=path, file_format=FileFormat.PARQUET, partition=Record(),
        record_count=rows.num_rows, file_size_in_bytes=local.stat().st_size, column_sizes={}, value_counts={},
        null_value_counts={}, nan_value_counts={}, lower_bounds={}, upper_bounds={},
        equality_ids=field_ids if content == "EQUALITY_DELETES" else None,
    )  # fmt: skip
    file.spec_id = table.spec().spec_id
    with table.transaction() as transaction:
        delta = RowDelta(Operation.DELETE, transaction, table.io)
        delta.append_data_file(file)
        delta.commit()
