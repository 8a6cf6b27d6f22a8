"""Search for a string in all files of a folder, including compressed files."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def read_pieces(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file as they lie there, and what its format makes of them."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        yield "\n".join(map(str, table.column_names)).encode()
        for column in table.columns:
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                yield "\n".join(map(str, column.to_pylist())).encode()
    elif path.suffix == ".tar":
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                yield member.name.encode()
                file = tar.extractfile(member)
                yield file.read() if file else b""


def find_text(folder: Path, text: str) -> list[str]:
    """Return the names of the files that hold it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(
        path.relative_to(folder).as_posix()
        for path in files
        if text in path.name or any(text.encode() in piece for piece in read_pieces(path))
    )
