"""Iceberg tables: pyiceberg plans and reads the data files, with deleted rows, added columns and renamed columns.

Tables and catalogs may name classes (``py-io-impl`` and other properties that end in ``-impl``, ``auth``). These are
left out: files are read by the class that pyiceberg has for their scheme.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pa_fs

from collm_dist.config.dataset_section import CatalogConfig
from collm_dist.data.ingest.file_format import LINE_COLUMN
from collm_dist.data.ingest.lake_tables import LakeFile, LakeTable, explain_lake_errors
from collm_dist.errors import ConfigError, DataError
from collm_dist.storage import explain_store_errors, open_filesystem

_MAX_SHOWN = 5


@dataclass(frozen=True)
class IcebergReader:
    """Reader of data files.

    Attributes:
        metadata: the table's, without its history.
        io: opens files.
        schema: of the snapshot.
    """

    metadata: Any
    io: Any
    schema: Any

    def read(self, file: LakeFile, row_groups: tuple[int, int] | None, columns: Sequence[str]) -> Iterator[Any]:
        """See ``LakeReader``. ``details`` of a file: its task. ``LINE_COLUMN`` numbers the rows that are kept."""
        from pyiceberg.expressions import AlwaysTrue
        from pyiceberg.io.pyarrow import ArrowScan, _read_all_delete_files

        assert row_groups is None  # a task is a whole file
        schema = self.schema.select(*dict.fromkeys(columns)) if columns else self.schema
        scan = ArrowScan(self.metadata, self.io, schema, AlwaysTrue())
        deletes = _read_all_delete_files(self.io, [file.details])
        row = 1
        # The public method keeps all batches of a file in memory.
        for batch in scan._record_batches_from_scan_tasks_and_deletes([file.details], deletes):
            table = pa.Table.from_batches([batch])
            yield table.append_column(LINE_COLUMN, pa.array(np.arange(row, row + table.num_rows)))
            row += table.num_rows


def open_iceberg_table(location: str, snapshot_id: int | None, key: str, catalog: CatalogConfig) -> LakeTable:
    """Open a table.

    Args:
        location: namespace.table of the catalog, or path or URI of a table's folder or of a metadata.json.
        snapshot_id: to read; None = the current one.
        key: name of the setting, for messages.
        catalog: settings of the catalog.

    Raises:
        ConfigError: the library or the catalog's library is not installed, or the catalog is not configured.
        DataError: table or snapshot does not exist, or it has rows or deletions that cannot be read.
        LaunchError: an object store is unreachable or denies access.
    """
    try:
        import pyiceberg.table  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{key}: '{location}' is an Iceberg table, which needs the library pyiceberg: pip install "
            "'collm-dist[iceberg]'"
        ) from None
    if location.endswith(".metadata.json") or "/" in location:
        table = _load_static_table(location, key)
    else:
        table = _load_from_catalog(location, key, catalog)
    place = f"{key}: '{location}'"
    with explain_lake_errors("an Iceberg table", place):
        current = table.metadata.current_snapshot_id
        if snapshot_id is None and current is None:
            raise DataError(f"{place} has no snapshot and so no rows; bring a table with data")
        chosen = current if snapshot_id is None else snapshot_id
        if table.metadata.snapshot_by_id(chosen) is None:
            known = sorted(table.metadata.snapshots, key=lambda snapshot: snapshot.timestamp_ms)[-_MAX_SHOWN:]
            shown = ", ".join(str(snapshot.snapshot_id) for snapshot in known) or "none"
            raise DataError(f"{place} has no snapshot {chosen}; it may have expired. The latest ones: {shown}")
        scan = table.scan(snapshot_id=chosen)
        metadata = table.metadata.model_copy(update={"snapshots": [], "snapshot_log": [], "metadata_log": []})
        return LakeTable(
            kind="iceberg",
            location=location,
            table_id=str(table.metadata.table_uuid),
            version=int(chosen),
            newest=int(current if current is not None else chosen),
            files={file.uri: file for file in _list_files(table, scan)},
            reader=IcebergReader(metadata, table.io, scan.projection()),
        )


def _list_files(table: Any, scan: Any) -> list[LakeFile]:
    """Return the files in the order of their commits, and in one commit by name."""
    from pyiceberg.manifest import ManifestContent

    snapshot = scan.snapshot()
    times = {snapshot.snapshot_id: snapshot.timestamp_ms for snapshot in table.metadata.snapshots}
    order = {
        entry.data_file.file_path: (entry.sequence_number or 0, times.get(entry.snapshot_id, 0))
        for manifest in snapshot.manifests(table.io)
        if manifest.content == ManifestContent.DATA
        for entry in manifest.fetch_manifest_entry(table.io)
    }
    tasks = sorted(scan.plan_files(), key=lambda task: (order.get(task.file.file_path, (0, 0)), task.file.file_path))
    return [LakeFile(task.file.file_path, int(task.file.file_size_in_bytes), task) for task in tasks]


def _names_code(name: str) -> bool:
    return name.endswith("-impl") or name == "auth"


def _drop_code(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in properties.items() if not _names_code(name)}


def _load_static_table(location: str, key: str) -> Any:
    """Load a table from its metadata file, or from its folder if that says which file is current."""
    from pyiceberg.catalog.noop import NoopCatalog
    from pyiceberg.io import load_file_io
    from pyiceberg.table import Table
    from pyiceberg.table.metadata import TableMetadataUtil

    folder = str(Path(location).expanduser().absolute()) if "://" not in location else location.rstrip("/")
    place = f"{key}: '{location}'"
    path = folder if folder.endswith(".metadata.json") else f"{folder}/metadata/{_read_hint(folder, place)}"
    with explain_lake_errors("an Iceberg table", place):
        metadata = TableMetadataUtil.parse_raw(_read_text(path, place))
        io = load_file_io(_drop_code(metadata.properties), path)
        return Table(("static", path), metadata, path, io, NoopCatalog("static"))


def _read_hint(folder: str, place: str) -> str:
    try:
        version = _read_text(f"{folder}/metadata/version-hint.text", place).strip()
    except DataError:
        raise DataError(
            f"{place} is not a table's metadata.json, and has no metadata/version-hint.text that says which one is "
            "current: give namespace.table with dataset.catalog, or the URI of a metadata.json"
        ) from None
    if not re.fullmatch(r"[\w.-]+", version):
        raise DataError(f"{place}: metadata/version-hint.text holds {version[:50]!a}, not a version")
    return version if version.endswith(".metadata.json") else f"{'v' * version.isdigit()}{version}.metadata.json"


def _read_text(uri: str, place: str) -> str:
    filesystem, path = open_filesystem(uri)
    try:
        with explain_store_errors(filesystem, f"{place} cannot be opened"):
            if filesystem.get_file_info(path).type != pa_fs.FileType.File:
                raise DataError(f"{place}: the file {uri} is missing")
            with filesystem.open_input_file(path) as file:
                return file.read().decode("utf-8")  # type: ignore[no-any-return]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: {uri} cannot be read: {error}") from None


def _load_from_catalog(identifier: str, key: str, settings: CatalogConfig) -> Any:
    from pyiceberg.catalog import AVAILABLE_CATALOGS, CatalogType, load_catalog
    from pyiceberg.exceptions import NoSuchTableError, NotInstalledError

    properties = settings.model_dump(exclude={"name"}, exclude_none=True)
    if settings.uri is not None and not settings.uri.startswith("http"):
        properties["init_catalog_tables"] = "false"  # of SQL catalogs: reading changes nothing
    place = f"{key}: '{identifier}'"
    try:
        AVAILABLE_CATALOGS[CatalogType.REST] = _build_rest_catalog
        catalog = load_catalog(settings.name, **properties)
    except (NotInstalledError, ImportError) as error:
        raise ConfigError(f"dataset.catalog needs a library that is not installed: {error}") from None
    except Exception as error:
        raise ConfigError(
            f"{place}: the catalog cannot be opened: {error}\nSet dataset.catalog.type and dataset.catalog.uri, or "
            "configure the catalog in ~/.pyiceberg.yaml and name it by dataset.catalog.name; dataset.path can also be "
            "the URI of a metadata.json"
        ) from error
    open_files = catalog._load_file_io  # all catalogs open the files of tables by this method
    catalog._load_file_io = lambda properties=None, location=None: open_files(_drop_code(properties or {}), location)
    with explain_lake_errors("an Iceberg table", place):
        try:
            return catalog.load_table(identifier)
        except NoSuchTableError:
            raise DataError(
                f"{place}: the catalog '{catalog.name}' has no such table; check namespace, name and dataset.catalog"
            ) from None


def _build_rest_catalog(name: str, properties: Mapping[str, Any]) -> Any:
    """Return a client of a catalog server that takes no names of classes from the server."""
    from pyiceberg.catalog.rest import RestCatalog

    class PlainRestCatalog(RestCatalog):  # type: ignore[misc]
        properties: dict[str, Any]

        def _fetch_config(self) -> None:
            own: dict[str, Any] = dict(self.properties)
            super()._fetch_config()
            received = _drop_code(self.properties)
            self.properties = received | {name: value for name, value in own.items() if _names_code(name)}

    return PlainRestCatalog(name, **properties)
