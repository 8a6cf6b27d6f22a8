"""Tables of lakehouses (Delta Lake, Apache Iceberg) as inputs: one version of a table is a fixed list of data files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.fs as pa_fs

from collm_dist.config import DatasetConfig
from collm_dist.errors import CollmError, ConfigError, DataError
from collm_dist.storage import explain_store_errors, find_lake_table, open_filesystem

Kind = Literal["delta", "iceberg"]
# Setting of the location, and what begins the names of its version and snapshot.
LOCATIONS = {"dataset.path": "", "dataset.items_path": "item_", "dataset.users_path": "user_"}
_VERSION_NAMES: dict[Kind, str] = {"delta": "version", "iceberg": "snapshot_id"}
_IDENTIFIER = re.compile(r"\w[\w-]*(\.\w[\w-]*)+")


@dataclass(frozen=True)
class LakeFile:
    """A data file of a table.

    Attributes:
        uri, num_bytes: the file and its size.
        details: what its reader needs besides the file, such as deleted rows.
    """

    uri: str
    num_bytes: int
    details: Any = None


@contextmanager
def explain_lake_errors(kind: str, place: str, remedy: str = "") -> Iterator[None]:
    """Raise DataError for any error of a table's library, whose classes share no base.

    Args:
        kind: what the place should be, with its article.
        place: setting and location, as the beginning of the message.
        remedy: end of the message.

    Raises:
        DataError: the library failed.
    """
    try:
        yield
    except CollmError:
        raise
    except Exception as error:
        if "equality deletes" in str(error):
            remedy = "; rewrite the table's data files (rewrite_data_files in Spark), which applies these deletions"
        raise DataError(f"{place} cannot be read as {kind}: {error}{remedy}") from error


class LakeReader(Protocol):
    """Reader of a table's data files. It is small, to be sent to workers."""

    def read(self, file: LakeFile, row_groups: tuple[int, int] | None, columns: Sequence[str]) -> Iterator[Any]:
        """Stream the rows of a file that are not deleted, with the table's columns and types, and ``LINE_COLUMN``.

        Args:
            file: the file.
            row_groups: first and one past the last to read; None = all.
            columns: names of the columns to read; empty = all.
        """


@dataclass(frozen=True)
class LakeTable:
    """One version of a table.

    Attributes:
        kind: delta or iceberg.
        location: as in the settings.
        table_id: the table's own id, which another table in the same place does not have.
        version, newest: version or snapshot that is read, and the newest.
        files: data files by URI, in the order in which they were committed.
        reader: of the files.
    """

    kind: Kind
    location: str
    table_id: str
    version: int
    newest: int
    files: Mapping[str, LakeFile] = field(repr=False)
    reader: LakeReader = field(repr=False)

    @property
    def has_row_groups(self) -> bool:
        """Whether a part of a file can be read."""
        return self.kind == "delta"

    def read(self, file: LakeFile, row_groups: tuple[int, int] | None, columns: Sequence[str]) -> Iterator[Any]:
        """Stream the rows of a file as its reader does.

        Raises:
            DataError: the file cannot be read.
            LaunchError: the object store is unreachable or denies access.
        """
        try:
            filesystem = open_filesystem(file.uri)[0] if re.match(r"(s3|gs)://", file.uri) else None
            with explain_store_errors(filesystem, f"{file.uri}: cannot be read"):
                for table in self.reader.read(file, row_groups, columns):
                    yield to_plain_columns(table)
        except CollmError:
            raise
        except Exception as error:  # those of the libraries share no base
            raise DataError(
                f"{file.uri}: cannot be read as a file of {self.show()}: {error}\nIf it was removed (VACUUM, expired "
                "snapshots), choose a newer version"
            ) from error

    def without_files(self) -> LakeTable:
        """Return the table without its list of files, to be sent to workers."""
        return replace(self, files={})

    def describe(self) -> dict[str, Any]:
        """Return the entry of the table in fingerprints and records."""
        return {"table": self.kind, "table_id": self.table_id, _VERSION_NAMES[self.kind]: self.version}

    def get_setting(self, key: str) -> str:
        """Return the setting that names the version of the table of a location."""
        return f"dataset.{LOCATIONS[key]}{_VERSION_NAMES[self.kind]}"

    def show(self) -> str:
        """Return table and version as they are shown to people."""
        name = {"delta": "Delta table, version", "iceberg": "Iceberg table, snapshot"}[self.kind]
        return f"{self.location} ({name} {self.version})"


def find_lake_kind(dataset: DatasetConfig, key: str) -> Kind | None:
    """Return what kind of table the location of a setting names; None for files.

    Args:
        dataset: the settings.
        key: a key of ``LOCATIONS``. ``dataset.path`` follows ``dataset.format``, the others what they find there.

    Raises:
        LaunchError: an object store is unreachable or denies access.
    """
    location = getattr(dataset, key.removeprefix("dataset."))
    if key == "dataset.path":
        return dataset.format if dataset.format in ("delta", "iceberg") else None
    if location is None or re.match(r"https?://", location):
        return None
    if location.endswith(".metadata.json"):
        return "iceberg"
    filesystem, path = open_filesystem(location, key)
    with explain_store_errors(filesystem, f"{key}: '{location}' cannot be opened"):
        found = filesystem.get_file_info(path).type
    if found == pa_fs.FileType.Directory:
        return find_lake_table(filesystem, path)
    is_missing = found == pa_fs.FileType.NotFound and _IDENTIFIER.fullmatch(location)
    knows_catalog = dataset.format == "iceberg" or dataset.catalog.model_fields_set
    return "iceberg" if is_missing and knows_catalog else None


def open_lake_table(dataset: DatasetConfig, key: str) -> LakeTable | None:
    """Open the table that a setting names, at the version that is set or else at its newest; None for files.

    Args:
        dataset: the settings.
        key: a key of ``LOCATIONS``.

    Raises:
        ConfigError: a library is not installed, or a version is set that does not apply.
        DataError: there is no such table or version, it has no rows, or it needs what cannot be read.
        LaunchError: an object store is unreachable or denies access.
    """
    kind, location = find_lake_kind(dataset, key), getattr(dataset, key.removeprefix("dataset."))
    for other, name in _VERSION_NAMES.items():
        setting = LOCATIONS[key] + name
        if kind != other and getattr(dataset, setting) is not None:
            label = {"delta": "a Delta table", "iceberg": "an Iceberg table"}[other]
            raise ConfigError(f"dataset.{setting} is set, but {key}={location} is not {label}; remove it")
    if kind is None:
        return None
    version = get_version(dataset, key, kind)
    if kind == "delta":
        from collm_dist.data.ingest.delta_tables import open_delta_table

        table = open_delta_table(location, version, key)
    else:
        from collm_dist.data.ingest.iceberg_tables import open_iceberg_table

        table = open_iceberg_table(location, version, key, dataset.catalog)
    if not table.files:
        raise DataError(f"{key}: {table.show()} has no rows; bring a version with data")
    return table


def open_tables(dataset: DatasetConfig) -> dict[str, LakeTable]:
    """Return the tables among the inputs by setting; see ``open_lake_table``."""
    return {key: table for key in LOCATIONS if (table := open_lake_table(dataset, key)) is not None}


def get_version(dataset: DatasetConfig, key: str, kind: Kind) -> int | None:
    """Return the version or snapshot that the settings name for a location."""
    version: int | None = getattr(dataset, LOCATIONS[key] + _VERSION_NAMES[kind])
    return version


def set_versions(dataset: DatasetConfig, versions: Mapping[str, Mapping[str, Any]]) -> DatasetConfig:
    """Return the settings with the recorded version of each table whose version is not set.

    Args:
        dataset: the settings.
        versions: ``LakeTable.describe`` by setting.
    """
    found = {}
    for key, entry in versions.items():
        for name in _VERSION_NAMES.values():
            setting = LOCATIONS[key] + name
            if name in entry and getattr(dataset, setting) is None:
                found[setting] = entry[name]
    return dataset.model_copy(update=found)


def to_plain_columns(table: Any) -> Any:
    """Return a table with UUIDs as their text, and other extension types as their storage types."""
    for position, column in enumerate(table.schema):
        if isinstance(column.type, pa.BaseExtensionType):
            values = table.column(position)
            if isinstance(column.type, pa.UuidType):
                texts = [None if value is None else str(value) for value in values.to_pylist()]
                values = pa.array(texts, pa.string())
            else:
                values = values.cast(column.type.storage_type)
            table = table.set_column(position, column.name, values)
    return table
