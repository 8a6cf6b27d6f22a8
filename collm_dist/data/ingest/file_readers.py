"""Readers of input files as streams of tables: text, Parquet, JSON lines, hive partitions."""

from __future__ import annotations

import codecs
import contextlib
import io
import re
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from collm_dist.errors import DataError
from collm_dist.storage import explain_store_errors, open_filesystem, split_query

BLOCK_BYTES = 8 << 20
MAX_COLUMNS = 10_000
NULLS = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "\\N"]


@dataclass(frozen=True)
class FileFormat:
    """Format of an input file.

    Attributes:
        kind: file type; auto decides by the suffix.
        delimiter: of text tables; a delimiter of two characters is replaced by a tab while reading.
        encoding: of text tables.
        names: column names of text tables without a header.
        schema: of JSON lines, the columns to read.
        typed_header: header cells look like ``name:type`` (RecBole atomic files).
    """

    kind: Literal["auto", "text", "parquet", "json"] = "auto"
    delimiter: str | None = None
    encoding: str = "utf8"
    names: tuple[str, ...] = ()
    schema: tuple[tuple[str, str], ...] = ()
    typed_header: bool = False


@dataclass
class BadRows:
    """Counts of unusable rows by cause, with the first examples."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, cause: str, count: int, example: str) -> None:
        """Count rows with a cause; keep at most five examples in total."""
        if count:
            self.counts[cause] += count
            if len(self.examples) < 5:
                self.examples.append(f"{example}: {cause}")

    def merge(self, other: BadRows) -> None:
        """Add another's counts and examples."""
        self.counts.update(other.counts)
        self.examples = (self.examples + other.examples)[:5]


def find_kind(uri: str, file_format: FileFormat) -> str:
    """Return the file type: text, parquet or json."""
    if file_format.kind != "auto":
        return file_format.kind
    name = split_query(uri)[0].lower().removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2")
    if name.endswith((".parquet", ".pq")):
        return "parquet"
    return "json" if name.endswith((".json", ".jsonl", ".ndjson")) else "text"


def count_row_groups(uri: str) -> int:
    """Return the number of row groups of a Parquet file.

    Raises:
        DataError: it is not a Parquet file, or a damaged one.
    """
    filesystem, path = open_filesystem(uri)
    try:
        with explain_store_errors(filesystem, f"{uri}: cannot be read"):
            return int(pq.read_metadata(path, filesystem=filesystem).num_row_groups)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri}: not a Parquet file, or a damaged one ({error})") from error


def read_tables(
    uri: str, file_format: FileFormat, bad_rows: BadRows, row_groups: tuple[int, int] | None = None
) -> Iterator[Any]:
    """Stream a file as tables, in order, with the values of hive partitions (``key=value`` folders) as columns.

    Args:
        uri: one file.
        file_format: its format.
        bad_rows: counts lines that do not parse.
        row_groups: of a Parquet file, the first and one past the last to read.

    Raises:
        DataError: the file as a whole cannot be read.
        LaunchError: the object store is unreachable or denies access.
    """
    filesystem, path = open_filesystem(uri)
    partition = dict(part.split("=", 1) for part in PurePosixPath(path).parts[:-1] if part.count("=") == 1)
    try:
        with explain_store_errors(filesystem, f"{uri}: cannot be read"):
            for table in _stream(uri, filesystem, path, file_format, bad_rows, row_groups):
                for name, value in partition.items():
                    if name not in table.column_names:
                        table = table.append_column(name, pa.repeat(pa.scalar(value), table.num_rows))
                yield table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{uri}: cannot be read as {find_kind(uri, file_format)}: {error}") from error


def _stream(
    uri: str, filesystem: Any, path: str, file_format: FileFormat, bad_rows: BadRows, row_groups: tuple[int, int] | None
) -> Iterator[Any]:
    kind = find_kind(uri, file_format)
    if kind == "parquet":
        with pq.ParquetFile(path, filesystem=filesystem, page_checksum_verification=True) as file:
            check_names(uri, list(file.schema_arrow.names))
            groups = range(*(row_groups or (0, file.num_row_groups)))
            for batch in file.iter_batches(batch_size=1 << 17, row_groups=list(groups)):
                yield pa.Table.from_batches([batch])
        return
    stream = filesystem.open_input_stream(path, compression="detect")
    filters: list[_Filter] = []
    if file_format.encoding == "utf8":
        stream = _filter(_ValidText(uri, stream, is_table=kind == "text"), filters)
    if kind == "json":
        stream = _filter(_NoNullLines(uri, stream), filters)
        schema = pa.schema([(name, pa.type_for_alias(alias)) for name, alias in file_format.schema]) or None
        behaviour = "ignore" if file_format.schema else "infer"
        parse = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=behaviour)
        with pa_json.open_json(stream, pa_json.ReadOptions(block_size=BLOCK_BYTES), parse) as reader:
            try:
                for batch in reader:
                    yield pa.Table.from_batches([batch])
            finally:
                _end(reader, filters)
        return
    yield from _stream_text(uri, stream, file_format, bad_rows, filters)


def _filter(stream: _Filter, filters: list[_Filter]) -> Any:
    filters.append(stream)
    return pa.PythonFile(stream, mode="r")


def _stream_text(
    uri: str, stream: Any, file_format: FileFormat, bad_rows: BadRows, filters: list[_Filter]
) -> Iterator[Any]:
    """Stream a text table with every column as bytes, so that a value that does not parse costs only its row."""
    delimiter = file_format.delimiter or (
        "\t" if re.search(r"\.(tsv|inter|item)(\.|$)", split_query(uri)[0].lower()) else ","
    )
    if len(delimiter) == 2:
        stream, delimiter = _filter(_FoldedDelimiter(stream, delimiter.encode()), filters), "\t"

    def skip(row: Any) -> str:
        # An unclosed quote joins all lines that follow into one row; each of them counts as lost.
        bad_rows.add("wrong number of columns", row.text.count("\n") + 1, f"{uri}:{row.number or '?'}")
        return "skip"

    quoting = False if file_format.delimiter == "::" or file_format.typed_header else '"'
    with pa_csv.open_csv(
        stream,
        pa_csv.ReadOptions(
            use_threads=False,
            block_size=BLOCK_BYTES,
            encoding=file_format.encoding,
            column_names=list(file_format.names) or None,
        ),
        pa_csv.ParseOptions(
            delimiter=delimiter, quote_char=quoting, newlines_in_values=bool(quoting), invalid_row_handler=skip
        ),
        pa_csv.ConvertOptions(default_column_type=pa.binary(), null_values=NULLS, strings_can_be_null=True),
    ) as reader:
        try:
            check_names(uri, list(reader.schema.names))
            for batch in reader:
                table = pa.Table.from_batches([batch])
                if file_format.typed_header:
                    table = table.rename_columns([name.partition(":")[0] for name in table.column_names])
                yield table
        finally:
            _end(reader, filters)


def check_names(uri: str, names: list[str]) -> None:
    """Check that no column name occurs twice.

    Raises:
        DataError: a name occurs twice.
    """
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{uri}: several columns are named '{repeated[0]}'; rename all but one")


_RECENT: deque[Any] = deque(maxlen=4)


class _Filter(io.RawIOBase):
    """A stream that transforms its input. Arrow's threads read ahead from it, see ``_end``."""

    def __init__(self) -> None:
        super().__init__()
        self.is_ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return b"" if self.is_ended else self._read(size)

    @abstractmethod
    def _read(self, size: int) -> bytes:
        """Return the next bytes, at most ``size`` unless that is negative; empty at the end."""


def _end(reader: Any, filters: list[_Filter]) -> None:
    """End the streams of a reader that may not have been read to its end.

    If one of Arrow's threads reads from them or releases them while the interpreter exits, the process aborts. So
    pending reads are completed here, and the last few readers are kept alive.
    """
    for stream in filters:
        stream.is_ended = True
    with contextlib.suppress(pa.ArrowException, OSError, DataError):
        for _ in reader:
            pass
    _RECENT.append(reader)


class _ValidText(_Filter):
    """A stream that replaces invalid UTF-8 by U+FFFD; the parser would reject the whole file for one such line."""

    def __init__(self, uri: str, stream: Any, is_table: bool) -> None:
        super().__init__()
        self._uri, self._stream, self._is_table = uri, stream, is_table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True

    def _read(self, size: int) -> bytes:
        while True:
            data: bytes = self._stream.read(size if size >= 0 else None)
            if self._at_start:
                self._check_start(data)
            self._at_start = False
            if data.isascii() and not self._decoder.getstate()[0]:
                return data
            valid = self._decoder.decode(data, final=not data).encode()
            if valid or not data:  # empty bytes would mean the end of the stream
                return valid

    def _check_start(self, data: bytes) -> None:
        if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{self._uri}: the file is UTF-16 text; save it as UTF-8")
        header = data.partition(b"\n")[0]
        # The parser needs minutes and gigabytes for a million columns.
        if self._is_table and max(header.count(delimiter) for delimiter in b",\t|") > MAX_COLUMNS:
            raise DataError(f"{self._uri}: the file has more than {MAX_COLUMNS:,} columns; check the delimiter")


class _FoldedDelimiter(_Filter):
    """A stream that replaces a delimiter of two characters by a tab; the parser supports single characters only."""

    def __init__(self, stream: Any, delimiter: bytes) -> None:
        super().__init__()
        self._stream, self._delimiter, self._held = stream, delimiter, b""

    def _read(self, size: int) -> bytes:
        data: bytes = self._held + self._stream.read(size if size >= 0 else None)
        # The next block may complete half a delimiter at the end of this one.
        cut = len(data) - (1 if size >= 0 and len(data) > len(self._held) and data.endswith(self._delimiter[:1]) else 0)
        data, self._held = data[:cut], data[cut:]
        return data.replace(b"\t", b" ").replace(self._delimiter, b"\t")


class _NoNullLines(_Filter):
    """A stream that refuses lines starting with ``null``; at the start of a block they crash Arrow's parser."""

    def __init__(self, uri: str, stream: Any) -> None:
        super().__init__()
        self._uri, self._stream = uri, stream
        self._line, self._line_start = 1, b""  # number and first bytes of the line that the last bytes belong to

    def _read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size if size >= 0 else None)
        text = self._line_start + data
        match = re.search(rb"(?:\A|[\r\n])[\s\xef\xbb\xbf]*null", text)
        if match:
            row = self._line + text.count(b"\n", 0, match.end())
            raise DataError(f"{self._uri}:{row}: expected an object, {{...}}, found 'null'; remove the line")
        self._line += text.count(b"\n")
        self._line_start = text[max(text.rfind(b"\n"), text.rfind(b"\r")) + 1 :].lstrip()[:8]
        return data
