"""Delta tables: the library reads the log; the data files are Parquet, read as any other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pa_fs

from collm_dist.data.ingest.file_format import LINE_COLUMN
from collm_dist.data.ingest.lake_tables import LakeFile, LakeTable, explain_lake_errors
from collm_dist.data.ingest.parquet_tables import read_parquet
from collm_dist.errors import ConfigError, DataError
from collm_dist.storage import explain_store_errors, open_filesystem

# Features of the protocol that change nothing for this reader, or that it follows.
_READER_FEATURES = {
    "columnMapping",
    "deletionVectors",
    "timestampNtz",
    "typeWidening",
    "typeWidening-preview",
    "v2Checkpoint",
    "vacuumProtocolCheck",
}
_PHYSICAL_NAME = "delta.columnMapping.physicalName"


@dataclass(frozen=True)
class DeltaReader:
    """Reader of data files.

    Attributes:
        schema: the table's.
        physical_names: of the columns in the files, by name; partition columns are in the log alone.
    """

    schema: Any
    physical_names: dict[str, str]

    def read(self, file: LakeFile, row_groups: tuple[int, int] | None, columns: Sequence[str]) -> Iterator[Any]:
        """See ``LakeReader``. ``details`` of a file: its partition values, and a mask of its first rows."""
        partition, kept = file.details
        fields = [column for column in self.schema if not columns or column.name in columns]
        physical = [self.physical_names[column.name] for column in fields if column.name in self.physical_names]
        filesystem, path = open_filesystem(file.uri)
        for table in read_parquet(filesystem, path, row_groups, physical):
            arrays = {column.name: self._build_column(table, column, partition) for column in fields}
            table = pa.table(arrays | {LINE_COLUMN: table.column(LINE_COLUMN)})
            if kept is not None:
                rows = table.column(LINE_COLUMN).to_numpy() - 1
                table = table.filter(pa.array(kept[np.minimum(rows, len(kept) - 1)] | (rows >= len(kept))))
            yield table

    def _build_column(self, table: Any, column: Any, partition: dict[str, Any]) -> Any:
        """Return a column in the table's type: missing in files that were written before it was added."""
        if column.name in partition:
            return pa.repeat(pa.scalar(partition[column.name], column.type), table.num_rows)
        name = self.physical_names.get(column.name)
        if name is None or name not in table.column_names:
            return pa.nulls(table.num_rows, column.type)
        values = table.column(name)
        if values.type == column.type or pa.types.is_nested(values.type):
            return values
        return values.cast(column.type, safe=not pa.types.is_timestamp(column.type))


def open_delta_table(location: str, version: int | None, key: str) -> LakeTable:
    """Open a table.

    Args:
        location: path or URI of the table's folder.
        version: to read; None = the newest.
        key: name of the setting, for messages.

    Raises:
        ConfigError: the library is not installed.
        DataError: table or version does not exist, or it needs a feature that cannot be read.
        LaunchError: an object store is unreachable or denies access.
    """
    try:
        import deltalake
    except ImportError:
        raise ConfigError(
            f"{key}: '{location}' is a Delta table, which needs the library deltalake: pip install 'collm-dist[delta]'"
        ) from None
    folder = str(Path(location).expanduser().absolute()) if "://" not in location else location.rstrip("/")
    _require_log(folder, location, key)
    with explain_lake_errors("a Delta table", f"{key}: '{location}'"):
        table = deltalake.DeltaTable(folder, storage_options=_build_storage_options())
        newest = table.version()
        if version is not None and version > newest:
            raise DataError(f"{key}: '{location}' has no version {version}; the newest is {newest}")
    if version is not None and version != newest:
        remedy = "; its log may have been cleaned up: choose a newer version"
        with explain_lake_errors("a Delta table", f"{key}: '{location}': version {version}", remedy):
            table = deltalake.DeltaTable(folder, version=version, storage_options=_build_storage_options())
    with explain_lake_errors("a Delta table", f"{key}: '{location}'"):
        _check_protocol(table, f"{key}: '{location}'")
        schema = pa.schema(table.schema().to_arrow())
        names = {column.name: _find_physical_name(column) for column in schema}
        partitions = set(table.metadata().partition_columns)
        return LakeTable(
            kind="delta",
            location=location,
            table_id=str(table.metadata().id),
            version=table.version(),
            newest=newest,
            files={file.uri: file for file in _list_files(table, folder)},
            reader=DeltaReader(schema, {name: path for name, path in names.items() if name not in partitions}),
        )


def _require_log(folder: str, location: str, key: str) -> None:
    filesystem, path = open_filesystem(folder, key)
    with explain_store_errors(filesystem, f"{key}: '{location}' cannot be opened"):
        kinds = [info.type for info in filesystem.get_file_info([path, f"{path}/_delta_log"])]
    if kinds[1] != pa_fs.FileType.Directory:
        what = "does not exist" if kinds[0] == pa_fs.FileType.NotFound else "has no folder _delta_log"
        raise DataError(
            f"{key}: '{location}' is not a Delta table: it {what}. Give the table's own folder, or set dataset.format "
            "to table for other files"
        )


def _build_storage_options() -> dict[str, str]:
    """Return options for an S3 endpoint over plain HTTP; the library itself reads all others from the environment."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    return {"AWS_ALLOW_HTTP": "true", "AWS_ENDPOINT_URL": endpoint} if endpoint.startswith("http://") else {}


def _check_protocol(table: Any, place: str) -> None:
    protocol = table.protocol()
    unknown = sorted(set(protocol.reader_features or ()) - _READER_FEATURES)
    if protocol.min_reader_version > 3 or unknown:
        needs = ", ".join(unknown) or f"reader version {protocol.min_reader_version}"
        raise DataError(
            f"{place} needs {needs}, which cannot be read here: drop the feature from the table, or export its rows "
            "as Parquet and set dataset.format to table"
        )


def _find_physical_name(column: Any) -> str:
    metadata = {bytes(name).decode(): bytes(value).decode() for name, value in (column.metadata or {}).items()}
    # The library returns the value as JSON.
    return re.sub(r'^[\'"](.*)[\'"]$', r"\1", metadata.get(_PHYSICAL_NAME, column.name))


def _list_files(table: Any, folder: str) -> list[LakeFile]:
    """Return the files by the time at which they were written, and in one commit by name."""
    kept, files = _find_kept_rows(table), []
    actions = pa.table(table.get_add_actions())
    order = pc.sort_indices(actions, sort_keys=[("modification_time", "ascending"), ("path", "ascending")])
    names = [name for name in ("path", "size_bytes", "partition") if name in actions.column_names]
    for action in actions.select(names).take(order).to_pylist():
        path = action["path"]  # percent-encoded, as in a URI
        if "://" not in path and not path.startswith("/"):
            path = f"{folder}/{path if '://' in folder else unquote(path)}"
        uri = unquote(path.removeprefix("file://")) if path.startswith("file://") else path
        mask = kept.pop(unquote(uri), None)
        files.append(LakeFile(uri, int(action["size_bytes"]), (action.get("partition") or {}, mask)))
    if kept:  # never read deleted rows
        raise DataError(f"the deletion vector of {min(kept)} belongs to none of the table's files")
    return files


def _find_kept_rows(table: Any) -> dict[str, Any]:
    """Return for each file with deleted rows a mask of those that are kept; rows behind its end are kept too."""
    found = pa.RecordBatchReader.from_stream(table.deletion_vectors()).read_all()
    return {
        unquote(path.as_py().removeprefix("file://")): mask.values.to_numpy(zero_copy_only=False)
        for path, mask in zip(found.column("filepath"), found.column("selection_vector"), strict=True)
    }
