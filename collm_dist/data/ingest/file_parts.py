"""Parts of a large text file that are read in parallel and give the rows that a serial read gives."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from collm_dist.data.ingest.file_format import BadRows, FileFormat, FilePart, TextLayout
from collm_dist.data.ingest.file_readers import find_kind
from collm_dist.data.ingest.text_blocks import Block, can_start_at_any_line, find_compression, read_blocks
from collm_dist.data.ingest.text_rows import RowSplitter
from collm_dist.data.ingest.text_tables import find_layout
from collm_dist.errors import CollmError
from collm_dist.storage import open_filesystem

# Least size of a part. It has four blocks then, each cut at a line end: about a million rows, read in seconds.
PART_BYTES = 30 << 20


def split_file(uri: str, file_format: FileFormat, size: int | None) -> Iterator[FilePart]:
    """Yield the parts of a text file in order.

    Files that are small, packed, behind http(s), or in an encoding such as UTF-16 are one part.

    A part starts at the end of a block at which no quoted cell is open. Since a block depends only on where it starts
    (``read_blocks``), and a row only on the rows before it in its block, parts give the blocks, rows, line numbers and
    messages of a serial read. To find such places, one pass follows the quotes; it neither parses nor converts cells.

    Args:
        uri: the file.
        file_format: its format.
        size: in bytes, if known.
    """
    part = FilePart()
    # Web servers need not send ranges of a file.
    can_split = can_start_at_any_line(file_format.encoding) and not uri.startswith(("http://", "https://"))
    if can_split and size is not None and size > PART_BYTES:
        try:
            for place in _find_places(uri, file_format):
                if size > place.start >= part.start + PART_BYTES:
                    yield FilePart(part.start, place.start, part.first_line, part.layout)
                    part = place
        except (CollmError, pa.ArrowException, OSError):
            pass  # the read of the last part comes to the same error and names the place
    yield part


def _find_places(uri: str, file_format: FileFormat) -> Iterator[FilePart]:
    """Yield the rest of the file behind each block that ends with a row."""
    filesystem, path = open_filesystem(uri)
    kind = find_kind(uri, file_format)
    if find_compression(uri, filesystem, path, kind) is not None:
        return
    follower = None if kind == "json" else _RowFollower(uri, file_format)
    for block in read_blocks(uri, filesystem, path, kind, file_format.encoding):
        if follower is None or follower.ends_row(block):
            next_line = block.first_line + block.lines.count(b"\n")
            yield FilePart(block.end, None, next_line, None if follower is None else follower.layout)


class _RowFollower:
    """Follows the quotes of a text table from block to block."""

    def __init__(self, uri: str, file_format: FileFormat) -> None:
        self._uri, self._file_format = uri, file_format
        self._splitter: RowSplitter | None = None
        self.layout: TextLayout | None = None

    def ends_row(self, block: Block) -> bool:
        lines: bytes = block.lines
        if self.layout is None:
            if (found := find_layout(self._uri, lines, self._file_format)) is None:
                return False
            self.layout, skipped = found
            lines = lines[skipped:]
        if self._splitter is None:
            self._splitter = RowSplitter(self._uri, self.layout, BadRows())
        return self._splitter.follow(block.first_line, lines)
