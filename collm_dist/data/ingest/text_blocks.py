"""Text files as blocks of whole lines in UTF-8: decompressed, decoded, with uniform line ends."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from collm_dist.data.ingest.file_format import BLOCK_BYTES, UTF8_OR_LATIN1
from collm_dist.errors import DataError

_READABLE = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_SUFFIXES = {"gzip": (".gz",), "bz2": (".bz2",), "zstd": (".zst", ".zstd"), "lz4": (".lz4",)}
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
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_blocks(uri: str, filesystem: Any, path: str, kind: str, encoding: str) -> Iterator[tuple[int, bytes]]:
    r"""Stream a file as ``(number of the first line, lines)``; every line ends in ``\n``, also the last.

    Args:
        uri: name for messages.
        filesystem, path: the file. What it is packed with is decided by its first bytes, not by its suffix.
        kind: text or json, for messages.
        encoding: as in ``FileFormat``.

    Raises:
        DataError: the file is an archive or binary file, or a line is longer than a block.
    """
    line, held = 1, b""
    for data in _decode(uri, _open(uri, filesystem, path, kind), encoding):
        lines = held + data
        cut = lines.rfind(b"\n") + 1
        if cut:
            whole = lines[:cut]
            yield line, _fix_latin1(whole) if encoding == UTF8_OR_LATIN1 else whole
            line += whole.count(b"\n")
        held = lines[cut:]
        if len(held) > BLOCK_BYTES:
            raise DataError(f"{uri}: cannot be read as {kind}: line {line} is longer than {BLOCK_BYTES >> 20} MB; "
                            "split or remove it")  # fmt: skip
    if held:
        yield line, _fix_latin1(held + b"\n") if encoding == UTF8_OR_LATIN1 else held + b"\n"


def _open(uri: str, filesystem: Any, path: str, kind: str) -> Any:
    with filesystem.open_input_stream(path, compression=None) as raw:
        head = bytes(raw.read(16))
    for magic, name in _OTHER.items():
        if head.startswith(magic):
            raise DataError(f"{uri}: cannot be read as {kind}: the file is {name}")
    packed = next((name for magic, name in _READABLE.items() if head.startswith(magic)), None)
    claimed = next((name for name, suffixes in _SUFFIXES.items() if path.lower().endswith(suffixes)), None)
    if claimed is not None and packed != claimed:
        raise DataError(
            f"{uri}: cannot be read as {kind}: in spite of its suffix the file is not {claimed}, but "
            f"{packed or 'not compressed'}; correct the suffix"
        )
    if packed is None and path.lower().endswith(".br"):  # Brotli has no signature
        packed = "brotli"
    return filesystem.open_input_stream(path, compression=packed)


def _decode(uri: str, stream: Any, encoding: str) -> Iterator[bytes]:
    r"""Yield the file's bytes in UTF-8 without a byte order mark, with ``\n`` at the end of lines."""
    is_raw = encoding in ("utf8", UTF8_OR_LATIN1)
    decoder = codecs.getincrementaldecoder("utf-8" if is_raw else encoding)("replace")
    at_start, return_held = True, b""
    with stream:
        while True:
            data: bytes = bytes(stream.read(BLOCK_BYTES))
            is_end = not data
            if at_start and is_raw and data[:2] in _UTF16:
                raise DataError(f"{uri}: the file is UTF-16 text; save it as UTF-8, or set dataset.encoding=utf-16")
            if at_start and data[257:262] == b"ustar":
                raise DataError(f"{uri}: the file is a tar archive; unpack it")
            is_plain = is_raw and (encoding == UTF8_OR_LATIN1 or (data.isascii() and not decoder.getstate()[0]))
            if not is_plain:
                data = decoder.decode(data, final=is_end).encode("utf-8", "replace")
            if at_start:
                data = data.removeprefix(codecs.BOM_UTF8)
            at_start = False
            data, return_held = return_held + data, b""
            if data.endswith(b"\r") and not is_end:
                data, return_held = data[:-1], b"\r"
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            if data:
                yield data
            if is_end:
                return


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
