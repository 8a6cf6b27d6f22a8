"""Text files as blocks of whole lines in UTF-8: decompressed, decoded, with uniform line ends."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from collm_dist.data.ingest.file_format import BLOCK_BYTES, PACKED_SUFFIXES, UTF8_OR_LATIN1, WHOLE_FILE, FilePart
from collm_dist.errors import DataError

_READABLE = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_OTHER = {
    b"PK\x03\x04": "a zip archive (or an Excel file); unpack it, or save the table as CSV",
    b"\xfd7zXZ\x00": "an xz archive; unpack it, or pack it with gzip or zstd",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a rar archive; unpack it",
    b"PAR1": "a Parquet file; give its name the suffix .parquet",
    b"\x89HDF": "an HDF5 file; save the table as Parquet or CSV",
    b"\x80\x04\x95": "a Python pickle; save the table as Parquet or CSV",
    b"\xd0\xcf\x11\xe0": "an Excel file; save the table as CSV",
}
# Encodings, by Python's names, in which each byte is a character, and the lower half is ASCII.
_ONE_BYTE = r"ascii|iso8859-\d+|cp125\d|koi8-[ru]"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Files that were put together from several have marks in the middle.
_MARKS = re.compile(rb"^(?:\xef\xbb\xbf)+", re.MULTILINE)


class Block(NamedTuple):
    r"""Whole lines of a text file, in UTF-8, each with ``\n`` at its end.

    Attributes:
        first_line: number of the first line in the file, from 1.
        lines: at most ``BLOCK_BYTES`` of the file.
        end: bytes of the file up to the end of the block.
    """

    first_line: int
    lines: bytes
    end: int


def can_start_at_any_line(encoding: str) -> bool:
    """Return whether text in an encoding can be cut at line ends before it is decoded."""
    return _is_utf8(encoding) or bool(re.fullmatch(_ONE_BYTE, codecs.lookup(encoding).name))


def find_compression(uri: str, filesystem: Any, path: str, kind: str) -> str | None:
    """Return what a file is packed with, decided by its first bytes; None = it is not packed.

    Raises:
        DataError: the file is an archive or binary file, or not what its suffix says.
    """
    with filesystem.open_input_stream(path, compression=None) as raw:
        head = bytes(raw.read(16))
    for magic, name in _OTHER.items():
        if head.startswith(magic):
            raise DataError(f"{uri}: cannot be read as {kind}: the file is {name}")
    packed = next((name for magic, name in _READABLE.items() if head.startswith(magic)), None)
    claimed = next((name for name, suffixes in PACKED_SUFFIXES.items() if path.lower().endswith(suffixes)), None)
    if claimed is not None and not head:
        raise DataError(f"{uri}: cannot be read as {kind}: the file has no bytes; remove it, or bring it again")
    if packed is None and claimed == "brotli":  # it has no signature
        return claimed
    if claimed is not None and packed != claimed:
        raise DataError(
            f"{uri}: cannot be read as {kind}: in spite of its suffix the file is not {claimed}, but "
            f"{packed or 'not compressed'}; correct the suffix"
        )
    return packed


def read_blocks(
    uri: str, filesystem: Any, path: str, kind: str, encoding: str, part: FilePart = WHOLE_FILE
) -> Iterator[Block]:
    """Stream a file, or a part of it, as blocks of lines.

    A block starts where the last one ends and depends on nothing before it, so a part that starts at the end of a
    block has the same blocks as the whole file.

    Args:
        uri: name for messages.
        filesystem, path: the file.
        kind: text or json, for messages.
        encoding: as in ``FileFormat``.
        part: bytes to read; they start and end at line ends.

    Raises:
        DataError: the file is an archive or binary file, or a line is longer than a block.
    """
    line, start, held, is_end = part.first_line, part.start, b"", False
    with _open(uri, filesystem, path, kind, encoding, part) as stream:
        while not is_end:
            wanted = BLOCK_BYTES if part.end is None else min(BLOCK_BYTES, part.end - start)
            data = held + _read_all(stream, max(0, wanted - len(held)))
            is_end = len(data) < BLOCK_BYTES
            if start == 0:
                _check_start(uri, data, encoding)
            cut = len(data) if is_end else _find_line_end(data)
            if not cut and not is_end:
                raise DataError(f"{uri}: cannot be read as {kind}: line {line} is longer than {BLOCK_BYTES >> 20} MB; "
                                "split or remove it")  # fmt: skip
            lines, held, start = _clean(data[:cut], encoding), data[cut:], start + cut
            if lines:
                yield Block(line, lines, start)
            line += lines.count(b"\n")


def _open(uri: str, filesystem: Any, path: str, kind: str, encoding: str, part: FilePart) -> Any:
    if part.start:
        file = filesystem.open_input_file(path)
        file.seek(part.start)
        return file
    stream = filesystem.open_input_stream(path, compression=find_compression(uri, filesystem, path, kind))
    return stream if can_start_at_any_line(encoding) else _Transcoder(stream, encoding)


def _read_all(stream: Any, size: int) -> bytes:
    """Read as many bytes as asked for, unless the stream ends; some streams return fewer at a time."""
    data = bytes(stream.read(size))
    while len(data) < size and (more := bytes(stream.read(size - len(data)))):
        data += more
    return data


def _find_line_end(data: bytes) -> int:
    r"""Return the bytes up to the last line end. A ``\r`` at the end of the data may belong to a ``\r\n``."""
    return max(data.rfind(b"\n"), data.rfind(b"\r", 0, len(data) - 1)) + 1


def _check_start(uri: str, data: bytes, encoding: str) -> None:
    if _is_utf8(encoding) and data[:2] in _UTF16:
        raise DataError(f"{uri}: the file is UTF-16 text; save it as UTF-8, or set dataset.encoding=utf-16")
    if _is_utf8(encoding) and b"\0" in data[:2]:
        guess = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
        raise DataError(f"{uri}: the file is probably UTF-16 text; save it as UTF-8, or set dataset.encoding={guess}")
    if data[257:262] == b"ustar":
        raise DataError(f"{uri}: the file is a tar archive; unpack it")


def _clean(data: bytes, encoding: str) -> bytes:
    r"""Return whole lines in UTF-8 without byte order marks at their starts, with ``\n`` at the end of each."""
    if not (data.isascii() or encoding == UTF8_OR_LATIN1):
        is_decoded = _is_utf8(encoding) or not can_start_at_any_line(encoding)
        data = data.decode("utf-8" if is_decoded else encoding, "replace").encode("utf-8", "replace")
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if codecs.BOM_UTF8 in data:
        data = _MARKS.sub(b"", data)
    if data and not data.endswith(b"\n"):
        data += b"\n"
    return _fix_latin1(data) if encoding == UTF8_OR_LATIN1 else data


def _is_utf8(encoding: str) -> bool:
    return encoding == UTF8_OR_LATIN1 or codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


class _Transcoder:
    """Stream in UTF-8 of text in an encoding whose line ends are found only by decoding."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder(encoding)("replace")

    def read(self, size: int) -> bytes:
        """Return about as many bytes, and none at the end of the stream."""
        data, is_end = b"", size == 0
        while not (data or is_end):
            raw = bytes(self._stream.read(size))
            is_end = not raw
            data = self._decoder.decode(raw, final=is_end).encode("utf-8", "replace")
        return data

    def __enter__(self) -> _Transcoder:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


def _fix_latin1(lines: bytes) -> bytes:
    """Return lines in UTF-8; those that are not valid UTF-8 are taken as Latin-1."""
    try:
        lines.decode()
    except UnicodeDecodeError:
        return b"".join(map(_fix_line, lines.splitlines(keepends=True)))
    return lines


def _fix_line(line: bytes) -> bytes:
    try:
        line.decode()
    except UnicodeDecodeError:
        return line.decode("latin1").encode()
    return line
