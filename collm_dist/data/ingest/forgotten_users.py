"""Users who are to be forgotten (``dataset.forget``): the list of them, and what stands in their place.

Indices, once given, stay: a forgotten user's index remains in the id table of a run that extends another, and leads to
a tombstone, which is no id. It names no rows, and every model treats it as unknown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from collm_dist.data.ingest.file_readers import NULLS, BadRows, FileFormat, read_tables
from collm_dist.data.ingest.normalize import to_text
from collm_dist.errors import DataError
from collm_dist.storage import list_files

KEY, COLUMN = "dataset.forget", "user_id"
# Ids with control characters are refused in logs, so no id begins like this.
_TOMBSTONE = "\x1aforgotten-"


def load_forgotten(uri: str | None, key: str = KEY) -> Any:
    """Load a list of users.

    Args:
        uri: files with a column ``user_id``; ids are compared as they are in logs. None = nobody.
        key: where it was named, for messages.

    Returns:
        The ids, each once, as an Arrow array of text.

    Raises:
        DataError: it is missing, has no such column, or a row without an id: a list must be whole.
        LaunchError: an object store cannot be reached or refuses.
    """
    found = pa.chunked_array([pa.array([], pa.string())])
    for one in list_files(uri, key) if uri is not None else ():
        losses, first = BadRows(), 0
        for table in read_tables(one, FileFormat(), losses):
            if COLUMN not in table.column_names:
                raise DataError(f"{key}: {one} has no column '{COLUMN}' (has {', '.join(table.column_names)}); rename "
                                "the one that names the users")  # fmt: skip
            ids = pc.utf8_trim_whitespace(to_text(table.column(COLUMN)))
            missing = pc.is_in(ids, pa.array([*NULLS, None])).to_numpy(zero_copy_only=False)
            if missing.any():
                raise DataError(f"{key}: {one}, row {first + missing.argmax() + 1}: {COLUMN} is empty; complete it or "
                                "take the row out")  # fmt: skip
            found, first = pa.chunked_array([*found.chunks, ids]), first + table.num_rows
        if losses.examples:
            raise DataError(f"{key}: {losses.examples[0]}; mend the list, it must be whole")
    return found.unique()


def write_tombstone(index: int) -> str:
    """Return what stands in the id table for a user who has been forgotten."""
    return f"{_TOMBSTONE}{index}"


def find_tombstones(data_dir: Path) -> NDArray[np.int64]:
    """Return the indices of users who have been forgotten, in ascending order."""
    ids = pq.read_table(data_dir / "users.parquet", columns=[COLUMN]).column(COLUMN)
    return np.flatnonzero(pc.starts_with(ids, _TOMBSTONE).to_numpy())
