"""Parts of a text file: together they give what a serial read gives, wherever the file is cut."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest import file_parts, text_blocks, text_rows
from collm_dist.data.ingest.file_format import UTF8_OR_LATIN1, WHOLE_FILE, TextLayout
from collm_dist.data.ingest.file_parts import split_file
from collm_dist.data.ingest.file_readers import BadRows, FileFormat, read_tables
from collm_dist.data.ingest.source import open_source
from collm_dist.data.ingest.text_rows import RowSplitter
from collm_dist.errors import CollmError

HEADER = "user_id,item_id,timestamp,review"
PLAIN = FileFormat()


def read_parts(path: Path, part_bytes: int, file_format: FileFormat = PLAIN) -> tuple[int, list]:
    """Return the number of parts, and what they hold: tables, counts of bad rows, messages, the error."""
    with mock.patch.object(file_parts, "PART_BYTES", part_bytes):
        parts = list(split_file(str(path), file_format, path.stat().st_size))
    bad_rows, tables, error = BadRows(), [], None
    try:
        for part in parts:
            found = BadRows()
            tables += [table.to_pydict() for table in read_tables(str(path), file_format, found, part=part)]
            bad_rows.merge(found)
    except CollmError as caught:
        error = str(caught)
    if error is not None:  # what comes before an error is not used
        return len(parts), [error]
    return len(parts), [tables, list(bad_rows.counts.items()), bad_rows.examples, bad_rows.first]


def check_cuts(path: Path, data: bytes, sizes: list[int], file_format: FileFormat = PLAIN) -> tuple[int, list]:
    """Compare parts with a serial read, for several sizes of blocks; return the largest number of parts, and a read."""
    path.write_bytes(data)
    most, serial = 0, []
    for size in sizes:
        with mock.patch.object(text_blocks, "BLOCK_BYTES", size):
            parts, serial = read_parts(path, 1 << 40, file_format)
            assert parts == 1
            for part_bytes in (1, 3 * size):
                parts, found = read_parts(path, part_bytes, file_format)
                assert found == serial
                most = max(most, parts)
    return most, serial


QUOTED = [
    '"plain"',
    "",
    '"two\nlines"',
    '"a ""word"", and\r\n\n1,2,3,4\nmore"',
    '5" disk',
    'ends with "',
    '"日本, é\r"',
    '"closed" too early',
    "x,one too many",
    '""',
]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_cuts_of_a_file_with_quotes(tmp_path, end):
    lines = [HEADER, *(f"u{n},é{n},{10**9 + n},{QUOTED[n % len(QUOTED)]}" for n in range(24)), "", "u,i,x"]
    data = ("\ufeff" + end.join(lines) + end).encode()
    most, (_, bad, examples, _) = check_cuts(tmp_path / "log.csv", data, [*range(60, 100, 6), 400])
    assert most > 8
    assert dict(bad)["wrong number of columns"] == 3
    assert f"log.csv:{len(end.join(lines).splitlines())}: " in examples[-1] or len(examples) == 5


def test_the_data_step_reads_parts_as_it_reads_files(tmp_path, monkeypatch):
    lines = [HEADER, *(f'u{n},{n},{10**9 + n},"a\nb"' for n in range(50)), "u,1,never,", "u,i,7,", "u,3"]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    monkeypatch.setattr(text_blocks, "BLOCK_BYTES", 64)
    monkeypatch.setattr(file_parts, "PART_BYTES", 1)
    settings = {"path": str(tmp_path / "log.csv"), "feedback": "implicit", "row_filter": "number(item_id) != 7"}
    source = open_source(DatasetConfig.model_validate(settings))
    chunks = list(source.split_chunks(source.inputs()))
    assert sum(chunk.num_bytes for chunk in chunks) == (tmp_path / "log.csv").stat().st_size
    assert len(chunks) > 10
    batches = [batch for chunk in chunks for batch in source.read_chunk(chunk)]
    assert sum(batch.rows_read for batch in batches) == 52
    users = [user for batch in batches for user in batch.table.column("user_id").to_pylist()]
    assert users == [f"u{n}" for n in range(50) if n != 7]
    places = sorted(example.partition(": ")[0] for batch in batches for example in batch.bad_examples)
    assert places == [f"{tmp_path}/log.csv:{line}" for line in (102, 104)]
    assert sum(sum(batch.notes.values()) for batch in batches) == 1


def test_a_quote_that_never_closes(tmp_path, monkeypatch):
    rows = [f"u{n},i{n},{10**9 + n},x" for n in range(40)]
    data = "\n".join([HEADER, *rows[:20], '1,"2,3,4', *rows[20:]]).encode()
    most, (tables, bad, examples, _) = check_cuts(tmp_path / "log.csv", data, [50, 53, 57])
    assert most > 5
    assert sum(len(table["user_id"]) for table in tables) == 20
    assert bad == [("wrong number of columns", 21)]
    assert "log.csv:22: " in examples[0]
    monkeypatch.setattr(text_rows, "BLOCK_BYTES", 100)
    _, (error,) = check_cuts(tmp_path / "log.csv", data, [50, 53, 57])
    assert "log.csv:22: cannot be read as text: the quote that opens in this row is not closed" in error


def test_a_line_that_is_too_long(tmp_path):
    rows = [f"u{n},i{n},{10**9 + n},{'x' * (n == 30) * 90}" for n in range(40)]
    most, (error,) = check_cuts(tmp_path / "log.csv", "\n".join([HEADER, *rows]).encode(), [50, 64])
    assert most > 5
    assert "line 32 is longer than" in error


@pytest.mark.parametrize(
    "file_format",
    [
        FileFormat(delimiter="::", names=tuple(HEADER.split(","))),
        FileFormat(delimiter=";"),
        FileFormat(delimiter="\t", encoding="latin1"),
        FileFormat(delimiter="|", encoding="cp1252"),
        FileFormat(delimiter="|", encoding=UTF8_OR_LATIN1),
    ],
)
def test_other_delimiters_and_encodings(tmp_path, file_format):
    encoding = "latin1" if file_format.encoding == UTF8_OR_LATIN1 else file_format.encoding
    lines = [HEADER, *(f"ü{n},{n},{10**9 + n},{'abc'[n % 3]}" for n in range(40))]
    data = "\n".join(lines[bool(file_format.names) :]).replace(",", file_format.delimiter).encode(encoding)
    most, (tables, *_) = check_cuts(tmp_path / "log.txt", data, [40, 47, 100], file_format)
    assert most > 5
    assert [user.decode() for table in tables for user in table["user_id"]] == [f"ü{n}" for n in range(40)]


def test_json_lines(tmp_path):
    rows = [{"user_id": n if n % 7 else f"u{n}", "item_id": "é", "timestamp": 10**9 + n} for n in range(40)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines[11:11] = ["", "null", '{"user_id": 1,']
    most, (tables, bad, examples, _) = check_cuts(tmp_path / "log.jsonl", "\n".join(lines).encode(), [60, 63, 100])
    assert most > 5
    assert sum(len(table["user_id"]) for table in tables) == 40
    assert bad == [("line is not a JSON object", 2)]
    assert ["log.jsonl:13: " in examples[0], "log.jsonl:14: " in examples[1]] == [True, True]


def test_packed_files_and_other_encodings_stay_whole(tmp_path):
    lines = [HEADER, *(f"u{n},i{n},{10**9 + n},é" for n in range(40))]
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "log.csv").write_bytes("\n".join(lines).encode("utf-16"))
    for name, file_format in (("log.csv.gz", PLAIN), ("log.csv", FileFormat(encoding="utf-16"))):
        with mock.patch.object(text_blocks, "BLOCK_BYTES", 64):
            parts, (tables, bad, *_) = read_parts(tmp_path / name, 1, file_format)
        assert (parts, sum(len(table["user_id"]) for table in tables), bad) == (1, 40, [])


def test_files_of_web_servers_stay_whole():
    assert list(split_file("https://example.org/log.csv", PLAIN, 1 << 40)) == [WHOLE_FILE]


TEXTS = st.lists(st.sampled_from(['"', '""', ",", "\n", "\r\n", "\r", "é", "日", "a", " ", "1,2,3,4\n"]), max_size=12)


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(TEXTS, max_size=25), quote=st.booleans(), seed=st.integers(0, 99))
def test_any_text_is_read_the_same_in_parts(tmp_path_factory, texts, quote, seed):
    draw, cells = random.Random(seed), ["".join(text) for text in texts]
    cells = ['"' + cell.replace('"', '""') + '"' if quote and draw.random() < 0.7 else cell for cell in cells]
    lines = [HEADER, "u,i,7,", *(f"u{n},i{n},{10**9 + n},{cell}" for n, cell in enumerate(cells))]
    data = ("\n".join(lines) + "\n" * draw.randrange(2)).encode()
    check_cuts(tmp_path_factory.getbasetemp() / "any.csv", data, draw.sample(range(50, 160), 2))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(['"', '""', "5", ",", ',"', '",', '"\n', "\n"]), max_size=30), st.integers(0, 99))
@example(['"5"5', "\n", '"5', "\n", '5"'], 0)
@example(['""', "\n", '"""', "\n", '"5', "\n", ',"5"'], 0)
def test_open_rows_are_found_without_a_scan(parts, seed):
    lines, layout = "".join([*parts, "\n"]).encode().splitlines(keepends=True), TextLayout(("a", "b"), ",", True)
    cut = random.Random(seed).randrange(len(lines))
    fast, slow = (RowSplitter("x", layout, BadRows()) for _ in range(2))
    for first, block in ((1, lines[:cut]), (1 + cut, lines[cut:])):
        if block:
            is_end = fast.follow(first, b"".join(block))
            slow.split(first, b"".join(block))
            assert (fast._held, fast._held and fast._held_line) == (slow._held, slow._held and slow._held_line)
            assert is_end == (not slow._held)
