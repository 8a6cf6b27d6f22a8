"""Forgotten users (``dataset.forget``): the list of their ids, and the tombstones that replace them.

Assigned indices never change: in a run that extends another, the index of a forgotten user stays in the id table and
maps to a tombstone instead of an id. No row has that index, and every model treats it as unknown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from collm_dist.data.ingest.file_format import LINE_COLUMN
from collm_dist.data.ingest.file_readers import NULLS, BadRows, FileFormat, read_tables
from collm_dist.data.ingest.id_forms import drop_fractions
from collm_dist.data.ingest.normalize import to_ids
from collm_dist.errors import DataError
from collm_dist.storage import list_files

KEY, COLUMN = "dataset.forget", "user_id"
# Logs with control characters in ids are refused, so no id can start with this.
_TOMBSTONE = "\x1aforgotten-"


def is_tombstone(raw_id: str) -> bool:
    """Return whether an id of a run stands for a forgotten user."""
    return raw_id.startswith(_TOMBSTONE)


def load_forgotten(uri: str | None, key: str = KEY) -> Any:
    """Load a list of users.

    Args:
        uri: files with a column ``user_id``, normalized like ids in logs. None = no users.
        key: name of the setting, for messages.

    Returns:
        The distinct ids as an Arrow string array, 17 for 17.0. Whichever form a log has, both are forgotten.

    Raises:
        DataError: a file is missing, has no such column, or has a row without an id.
        LaunchError: an object store is unreachable or denies access.
    """
    all_ids = pa.chunked_array([pa.array([], pa.string())])
    for file in list_files(uri, key) if uri is not None else ():
        bad_rows = BadRows()
        for table in read_tables(file, FileFormat(), bad_rows):
            if COLUMN not in table.column_names:
                available = ", ".join(name for name in table.column_names if name != LINE_COLUMN)
                raise DataError(
                    f"{key}: {file} has no column '{COLUMN}' (has {available}); rename the column of user ids"
                )
            ids = drop_fractions(to_ids(table.column(COLUMN)))
            missing = pc.is_in(ids, pa.array([*NULLS, None])).to_numpy(zero_copy_only=False)
            if missing.any():
                line = table.column(LINE_COLUMN)[int(missing.argmax())]
                raise DataError(f"{key}: {file}, line {line}: {COLUMN} is empty; fill it in or remove the row")
            all_ids = pa.chunked_array([*all_ids.chunks, ids])
        if bad_rows.examples:
            raise DataError(f"{key}: {bad_rows.examples[0]}; fix the list, every row must be readable")
    return all_ids.unique()


def write_tombstone(index: int) -> str:
    """Return the id-table entry of a forgotten user."""
    return f"{_TOMBSTONE}{index}"


def find_tombstones(data_dir: Path) -> NDArray[np.int64]:
    """Return the indices of forgotten users in ascending order."""
    ids = pq.read_table(data_dir / "users.parquet", columns=[COLUMN]).column(COLUMN)
    return np.flatnonzero(pc.starts_with(ids, _TOMBSTONE).to_numpy())
