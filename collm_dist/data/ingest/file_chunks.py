"""Inputs of read tasks: files, or ranges of their row groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from collm_dist.data.ingest.file_format import WHOLE_FILE, FileFormat, FilePart
from collm_dist.data.ingest.file_parts import PART_BYTES
from collm_dist.data.ingest.file_readers import find_kind
from collm_dist.data.ingest.lake_tables import LakeFile
from collm_dist.data.ingest.parquet_tables import count_row_groups

ROW_GROUPS_PER_CHUNK = 16


@dataclass(frozen=True)
class FileChunk:
    """Input of one read task: a file, a range of a Parquet file's row groups, or a part of a text file.

    Attributes:
        uri: the file.
        row_groups, part: as in ``read_tables``.
        num_bytes: size of the input, for progress; 0 = not known.
        lake_file: the file of a lakehouse table.
    """

    uri: str
    row_groups: tuple[int, int] | None = None
    part: FilePart = WHOLE_FILE
    num_bytes: int = 0
    lake_file: LakeFile | None = None


def list_chunks(uris: Iterable[str], file_format: FileFormat) -> Iterator[FileChunk]:
    """Yield the inputs of read tasks: text files as a whole, large Parquet files as ranges of row groups.

    Args:
        uris: the files.
        file_format: their format.

    Raises:
        DataError: a Parquet file is damaged.
    """
    lake = file_format.table
    for uri in uris:
        lake_file, has_groups = None, find_kind(uri, file_format) == "parquet"
        if lake is not None:
            lake_file = lake.files[uri]
            has_groups = lake.has_row_groups and lake_file.num_bytes > PART_BYTES
        if not has_groups:
            yield FileChunk(uri, lake_file=lake_file)
            continue
        groups = count_row_groups(uri)
        for start in range(0, max(groups, 1), ROW_GROUPS_PER_CHUNK):
            yield FileChunk(uri, (start, min(start + ROW_GROUPS_PER_CHUNK, groups)), lake_file=lake_file)
