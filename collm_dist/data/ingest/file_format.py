"""Format of input files, and counts of the rows that cannot be used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collm_dist.data.ingest.lake_tables import LakeTable

BLOCK_BYTES = 8 << 20
MAX_COLUMNS = 10_000
NULLS = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "\\N"]
# Column of the tables that readers return: the line of a row in its file, or its number in a Parquet file, from 1.
LINE_COLUMN = "__line"
# Suffixes of file types, and of text files that are packed, by the library's name of the packing.
PARQUET_SUFFIXES, JSON_SUFFIXES = (".parquet", ".pq"), (".json", ".jsonl", ".ndjson")
PACKED_SUFFIXES = {"gzip": (".gz",), "bz2": (".bz2",), "zstd": (".zst", ".zstd"), "lz4": (".lz4",), "brotli": (".br",)}
# Files of before 2010 are in Latin-1, and some copies of them in UTF-8.
UTF8_OR_LATIN1 = "utf8 or latin1"


@dataclass(frozen=True)
class FileFormat:
    """Format of an input file.

    Attributes:
        kind: file type; auto decides by the suffix.
        delimiter: of text tables, one or two characters; None = by suffix and first line. Tabs: cells are not quoted.
        encoding: of text files; invalid bytes become U+FFFD. ``UTF8_OR_LATIN1`` decides line by line.
        names: column names of text tables without a header.
        delimiter_key: the setting that gave the delimiter; a header that lacks it is refused.
        schema: of JSON lines, the usual types of columns.
        has_more_columns: of JSON lines, whether columns that the schema lacks are read too.
        expected: of JSON lines, columns that are missing values where a whole block lacks them; of tables, the columns
            to read.
        typed_header: header cells look like ``name:type`` (RecBole atomic files).
        table: the lakehouse table whose files these are.
    """

    kind: Literal["auto", "text", "parquet", "json"] = "auto"
    delimiter: str | None = None
    encoding: str = "utf8"
    names: tuple[str, ...] = ()
    delimiter_key: str | None = None
    schema: tuple[tuple[str, str], ...] = ()
    has_more_columns: bool = False
    expected: tuple[str, ...] = ()
    typed_header: bool = False
    table: LakeTable | None = None


def find_named_kind(name: str) -> Literal["text", "parquet", "json"]:
    """Return the file type by the suffix of a file's name."""
    plain = name.lower()
    for suffix in chain.from_iterable(PACKED_SUFFIXES.values()):
        plain = plain.removesuffix(suffix)
    if plain.endswith(PARQUET_SUFFIXES):
        return "parquet"
    return "json" if plain.endswith(JSON_SUFFIXES) else "text"


@dataclass(frozen=True)
class TextLayout:
    """Layout of a text table, decided by its first line.

    Attributes:
        names: of the columns.
        delimiter: one or two characters.
        is_quoted: whether a cell may be quoted.
    """

    names: tuple[str, ...]
    delimiter: str
    is_quoted: bool

    @property
    def inner_delimiter(self) -> str:
        """Delimiter for the parser, which supports single characters only."""
        return "\t" if len(self.delimiter) == 2 else self.delimiter


@dataclass(frozen=True)
class FilePart:
    """A run of whole rows of a text file.

    Attributes:
        start, end: bytes in the file; end None = to its end.
        first_line: number of the line at ``start``, from 1.
        layout: of a text table behind its header.
    """

    start: int = 0
    end: int | None = None
    first_line: int = 1
    layout: TextLayout | None = None


WHOLE_FILE = FilePart()


@dataclass
class BadRows:
    """Counts of unusable rows by cause, with the first examples.

    Attributes:
        counts: rows by cause.
        examples: ``file:line: cause (value)`` of the first rows.
        first: ``file:line (value)`` of the first row of each cause.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, cause: str, count: int, place: str, value: str | None = None) -> None:
        """Count rows with a cause; keep at most five examples in total, with what stands there."""
        if count:
            self.counts[cause] += count
            shown = f" ({value})" if value is not None else ""
            self.first.setdefault(cause, f"{place}{shown}")
            if len(self.examples) < 5:
                self.examples.append(f"{place}: {cause}{shown}")

    def merge(self, other: BadRows) -> None:
        """Add another's counts and examples."""
        self.counts.update(other.counts)
        self.examples = (self.examples + other.examples)[:5]
        self.first = {**other.first, **self.first}

    def clear(self) -> None:
        """Start again at zero."""
        self.counts, self.examples, self.first = Counter(), [], {}
