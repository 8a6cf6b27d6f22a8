"""Rows of a text table: which lines they stand on, and whether they have as many cells as the header."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.ingest.file_format import BLOCK_BYTES, BadRows, TextLayout
from collm_dist.errors import DataError

WRONG_WIDTH = "wrong number of columns"
JOINED = "line joined to another row by a quote that is not closed"
MAX_CELL_LINES = 1000
_NEWLINE, _QUOTE = ord("\n"), ord('"')
_MIXED = 0  # in place of the number of cells: cells of several rows, counted already


class RowSplitter:
    """Splits lines into rows. Rows of another width are counted and left out.

    A quote at the start of a cell opens it, and it may then contain delimiters and line ends. A quote that is closed
    too late swallows rows, so lines inside a quoted cell are counted as lost, unless the cell is a plausible text of
    several lines: the quote that closes it ends the cell, most of its lines do not look like rows, and it has at most
    ``MAX_CELL_LINES``. Of a plausible text the lines that look like rows are counted.
    """

    def __init__(self, uri: str, layout: TextLayout, bad_rows: BadRows) -> None:
        self._uri, self._delimiter, self._is_quoted = uri, layout.inner_delimiter.encode(), layout.is_quoted
        self._width, self._bad_rows = len(layout.names), bad_rows
        self._held, self._held_line = b"", 0
        self.has_line_ends = False  # whether a row of the last block spans several lines

    def split(self, first_line: int, lines: bytes) -> tuple[bytes, NDArray[np.int64]]:
        """Return the rows of a block that have the header's width, and the number of the first line of each."""
        if self._held:
            lines, first_line = self._held + lines, self._held_line
        self._held = b""
        data = np.frombuffer(lines, np.uint8)
        ends = np.flatnonzero(data == _NEWLINE) + 1
        starts = np.concatenate([[0], ends[:-1]])
        cells, is_start, limit = self._count_cells(lines, data, starts, ends, first_line)
        rows = np.flatnonzero(is_start[:limit])
        row_ends = np.append(starts[rows[1:]], ends[limit - 1] if limit else 0)[: len(rows)]
        is_blank = row_ends - starts[rows] == 1
        keep = (cells[rows] == self._width) & ~is_blank
        self._count_wrong(cells[rows], ~keep & ~is_blank & (cells[rows] != _MIXED), first_line + rows)
        self.has_line_ends = len(rows) < limit
        if keep.all() and limit == len(ends):
            return lines, first_line + rows
        mask = np.repeat(keep, row_ends - starts[rows])
        return data[: len(mask)][mask].tobytes(), first_line + rows[keep]

    def follow(self, first_line: int, lines: bytes) -> bool:
        """Pass over a block, and return whether its last line ends a row, so that the next block starts with a row."""
        whole, number = (self._held + lines, self._held_line) if self._held else (lines, first_line)
        start = _find_open_row(whole, self._delimiter[0]) if self._is_quoted else len(whole)
        if start is None:
            self.split(first_line, lines)
        else:
            self._hold(whole, start, number + whole.count(b"\n", 0, start))
        return not self._held

    def _hold(self, lines: bytes, start: int, line: int) -> None:
        """Keep the row that a quote leaves open, with the number of its line, for the next block."""
        self._held, self._held_line = lines[start:], line
        if len(self._held) > BLOCK_BYTES:
            raise DataError(f"{self._uri}:{line}: cannot be read as text: the quote that opens in this row is not "
                            "closed within 8 MB; close or remove it")  # fmt: skip

    def finish(self) -> None:
        """Count the lines behind a quote that is never closed."""
        if self._held:
            place = f"{self._uri}:{self._held_line}"
            self._bad_rows.add(WRONG_WIDTH, self._held.count(b"\n"), place, "a quote opens here that is never closed")

    def _count_wrong(self, cells: NDArray[np.int64], is_wrong: NDArray[np.bool_], numbers: NDArray[np.int64]) -> None:
        for width, count in Counter(cells[is_wrong].tolist()).items():
            place = f"{self._uri}:{numbers[is_wrong & (cells == width)][0]}"
            self._bad_rows.add(
                WRONG_WIDTH, count, place, f"{count} rows have {width} columns, the header {self._width}"
            )

    def _count_cells(
        self, lines: bytes, data: Any, starts: NDArray[np.int64], ends: NDArray[np.int64], first_line: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], int]:
        """Return the cells of each line's row, whether a row starts there, and the number of lines to use now."""
        delimiters = np.flatnonzero(data == self._delimiter[0])
        quotes = np.flatnonzero(data == _QUOTE) if self._is_quoted else np.zeros(0, np.int64)
        is_start = np.ones(len(ends), bool)
        naive = np.searchsorted(delimiters, ends) - np.searchsorted(delimiters, starts) + 1
        if not len(quotes):
            return naive, is_start, len(ends)
        cells, clean = _count_quoted(data, starts, ends, delimiters, quotes, self._delimiter[0])
        cells = np.where(clean, cells, naive)
        looks = cells == self._width  # each line taken by itself
        next_line, prose = 0, self._delimiter + b" "  # a line of a text may have as many commas as a row
        for line in np.flatnonzero(~clean).tolist():
            if line < next_line:
                continue
            end, count, odd_cell = _scan_row(lines, int(starts[line]), self._delimiter)
            if end < 0:
                self._hold(lines, int(starts[line]), first_line + line)
                return cells, is_start, line
            next_line = int(np.searchsorted(ends, end)) + 1
            cells[line] = count
            is_start[line + 1 : next_line] = False
            if count == self._width:
                swallowed = range(line + 1, next_line)
                similar = sum(bool(looks[n]) and prose not in lines[starts[n] : ends[n]] for n in swallowed)
                lost = _count_lost(len(swallowed), similar, is_odd=odd_cell > 0)
                if 0 < odd_cell < count:  # the cells behind it are those of another row
                    cells[line], lost = _MIXED, lost + 1
                place = f"{self._uri}:{first_line + line}"
                self._bad_rows.add(JOINED, lost, place, f"{lost} of the lines from here on")
            elif next_line - line > 1:
                place = f"{self._uri}:{first_line + line + 1}"
                self._bad_rows.add(WRONG_WIDTH, next_line - line - 1, place, "inside a quoted cell")
        return cells, is_start, len(ends)


def _count_quoted(
    data: Any, starts: Any, ends: Any, delimiters: Any, quotes: Any, delimiter: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the cells of each line, and for which lines that holds: their quotes enclose whole cells."""
    line_of_quote = np.searchsorted(ends, quotes, side="right")
    before_line = np.searchsorted(quotes, starts)
    opens = (np.arange(len(quotes)) - before_line[line_of_quote]) % 2 == 0
    neighbour = data[np.where(opens, np.maximum(quotes - 1, 0), quotes + 1)]
    fits = (neighbour == delimiter) | (neighbour == _NEWLINE) | (opens & (quotes == 0))
    per_line = np.searchsorted(quotes, ends) - before_line
    clean = per_line % 2 == 0
    clean[line_of_quote[~fits]] = False
    line_of_delimiter = np.searchsorted(ends, delimiters, side="right")
    is_inside = (np.searchsorted(quotes, delimiters) - before_line[line_of_delimiter]) % 2 == 1
    cells = np.bincount(line_of_delimiter[~is_inside], minlength=len(ends)) + 1
    return cells, clean


def _find_open_row(lines: bytes, delimiter: int) -> int | None:
    """Return where the row starts that a quote leaves open at the end of lines that start with a row.

    Returns the length of the lines if there is none, and None if a quote stands elsewhere than at the start or end of
    a cell, or doubled in it: then the rows have to be scanned.
    """
    if b'"' not in lines:
        return len(lines)
    data = np.frombuffer(lines, np.uint8)
    quotes = np.flatnonzero(data == _QUOTE)
    # Of a doubled quote, the first seems to close the cell and the second to open it again. Before the first byte
    # stands, in effect, the line end that is the last byte.
    neighbours = data[np.concatenate([quotes[::2] - 1, quotes[1::2] + 1])]
    if not ((neighbours == delimiter) | (neighbours == _NEWLINE) | (neighbours == _QUOTE)).all():
        return None
    if len(quotes) % 2 == 0:
        return len(lines)
    closes = [-1, *quotes[1::2].tolist()]
    for close, opening in zip(closes[::-1], quotes[::2][::-1].tolist(), strict=True):
        if (end := lines.rfind(b"\n", close + 1, opening)) >= 0:
            return end + 1
    return 0


def _count_lost(count: int, similar: int, *, is_odd: bool) -> int:
    """Return how many of the lines inside a row's quoted cells are lost.

    Args:
        count: number of these lines.
        similar: number of those that look like rows.
        is_odd: whether text follows the quote that closes a cell of several lines.
    """
    return count if is_odd or 2 * similar >= count or count > MAX_CELL_LINES else similar


def _scan_row(lines: bytes, position: int, delimiter: bytes) -> tuple[int, int, int]:
    """Return the end of the row that starts at a position, its number of cells, and the number of its first odd cell.

    The end is -1 if a quote is not closed. A cell is odd if it has several lines and text behind its closing quote,
    which then probably opens the cell of another row; 0 = none is.
    """
    cells, odd_cell = 1, 0
    while True:
        if lines[position : position + 1] == b'"':
            start = position
            position += 1
            while True:
                position = lines.find(b'"', position) + 1
                if position == 0:
                    return -1, cells, odd_cell
                if lines[position : position + 1] != b'"':
                    break
                position += 1
            rest = position
            while lines[rest : rest + 1] == b" ":
                rest += 1
            if not odd_cell and lines[rest : rest + 1] not in (delimiter, b"\n") and b"\n" in lines[start:position]:
                odd_cell = cells
        end = lines.find(b"\n", position)
        position = lines.find(delimiter, position, end) + 1
        if position == 0:
            return end + 1, cells, odd_cell
        cells += 1
