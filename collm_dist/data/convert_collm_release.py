"""Converter of the CoLLM authors' released pickles to Parquet files that the ``table`` format reads.

    python -m collm_dist.data.convert_collm_release FOLDER_OR_ZIP OUTPUT_DIR

writes ``interactions.parquet`` and ``items.parquet``, the inputs of ``configs/ml1m_official.yaml``.

A pickle is a program. The unpickler here may name only what pandas and numpy need to rebuild a data frame; anything
else, such as a call to the operating system, is refused before it runs.
"""

from __future__ import annotations

import argparse
import io
import pickle
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pandas.compat.pickle_compat import Unpickler as PandasUnpickler

from collm_dist.cli import run_reporting
from collm_dist.errors import DataError
from collm_dist.runs.atomic_files import open_atomic

# The authors' rows are in time order.
SPLIT_FILES = {"train": "train_ood2.pkl", "valid": "valid_ood2.pkl", "test": "test_ood2.pkl"}
# The authors' column names and ours.
COLUMNS = {"uid": "user_id", "iid": "item_id", "timestamp": "timestamp", "label": "label", "title": "title"}
INTERACTION_COLUMNS = ["user_id", "item_id", "timestamp", "label", "split"]
MAX_FILE_BYTES = 8 << 30

_ALLOWED_NAMES = {
    "builtins": {"slice", "bytearray"},
    "__builtin__": {"slice", "bytearray"},
    "_codecs": {"encode"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "pandas": {"DataFrame", "Series", "Index", "RangeIndex", "StringDtype"},
    "pandas.arrays": {"ArrowStringArray", "StringArray"},
    "pandas.core.frame": {"DataFrame"},
    "pandas.core.series": {"Series"},
    "pandas.core.internals.managers": {"BlockManager", "SingleBlockManager"},
    "pandas.core.internals.blocks": {"new_block"},
    "pandas._libs.internals": {"_unpickle_block", "BlockPlacement"},
    "pandas.core.indexes.base": {"_new_Index", "Index"},
    "pandas.core.indexes.range": {"RangeIndex"},
    "pandas.core.indexes.numeric": {"Int64Index", "Float64Index"},
    "pandas.core.arrays.string_": {"StringDtype", "StringArray"},
    "pandas.core.arrays.string_arrow": {"ArrowStringArray"},
    "pandas.core.dtypes.dtypes": {"CategoricalDtype"},
    "pandas._libs.arrays": {"__pyx_unpickle_NDArrayBacked"},
    "pyarrow.lib": {"_restore_array", "chunked_array", "py_buffer", "type_for_alias"},
}


class _FrameUnpickler(PandasUnpickler):  # type: ignore[misc]
    """Pandas' unpickler, which knows the module names of older releases, restricted to an allow-list."""

    dispatch: ClassVar[dict[int, Any]] = PandasUnpickler.dispatch.copy()

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a data frame")
        if name == "_restore_array":
            return _restore_array
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set an object's state. Numpy trusts the flags in a pickled dtype, so false ones are refused here."""
        target, state = self.stack[-2:]
        if isinstance(target, np.dtype) and (state[2:5] != (None, None, None) or state[7] != target.flags):
            raise pickle.UnpicklingError(f"the pickled state of dtype {target} has false flags")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _restore_array(data: Any) -> Any:
    """Return a pickled Arrow array after validation; false buffer lengths would be read past the end of a buffer."""
    array = pa.lib._restore_array(data)
    array.validate(full=True)
    return array


def convert_release(source: Path, output_dir: Path) -> tuple[Path, Path]:
    """Convert a release to ``interactions.parquet`` and ``items.parquet``, and return their paths.

    Interactions keep the authors' row order: train, valid, test. An item keeps the title of its first row.

    Args:
        source: folder or zip with the pickles of the three splits.
        output_dir: created if missing.

    Raises:
        DataError: a pickle is missing, is not a plain pickled data frame, or lacks a column.
        DiskError: the output cannot be written.
    """
    tables = [_read_split(split, *file) for split, file in find_split_files(source).items()]
    try:
        rows = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        item_ids = rows.column("item_id").combine_chunks()
        first_rows = pc.index_in(item_ids.unique().drop_null(), item_ids)
        items = rows.select(["item_id", "title"]).take(first_rows)
    except pa.ArrowException as error:
        raise DataError(f"{source}: the columns of the three splits do not fit together: {error}") from None
    paths = output_dir / "interactions.parquet", output_dir / "items.parquet"
    for path, table in zip(paths, (rows.select(INTERACTION_COLUMNS), items), strict=True):
        with open_atomic(path, "wb") as file:
            pq.write_table(table, file)
    return paths


def find_split_files(source: Path) -> dict[str, tuple[Path, str | None]]:
    """Return the pickle of each split in a folder or zip, as its path, or as the zip's path and the member's name.

    Raises:
        DataError: a pickle is missing or occurs twice, or the zip cannot be read.
    """
    source = source.expanduser()
    candidates: list[tuple[Path, str | None]]
    if source.is_file() and zipfile.is_zipfile(source):
        try:
            with zipfile.ZipFile(source) as archive:
                candidates = [(source, member) for member in archive.namelist()]
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise DataError(f"{source}: the zip cannot be read: {error}") from None
    else:
        candidates = [(path, None) for path in sorted(source.rglob("*.pkl"))]
    files = {}
    for split, name in SPLIT_FILES.items():
        matches = [candidate for candidate in candidates if Path(candidate[1] or candidate[0]).name == name]
        if not matches:
            raise DataError(f"{source}: {name} is missing; give the folder or zip of the authors' pickles")
        if len(matches) > 1:
            raise DataError(f"{source}: {name} occurs twice, as {' and '.join(_show(*file) for file in matches[:2])}; "
                            "give the folder of one dataset")  # fmt: skip
        files[split] = matches[0]
    return files


def _show(path: Path, member: str | None) -> str:
    return str(path) if member is None else f"{path}::{member}"


def _read_split(split: str, path: Path, member: str | None) -> Any:
    """Read a split's pickle as a table ``user_id, item_id, timestamp, label, title, split``.

    Raises:
        DataError: it is not a plain pickled data frame, or lacks a column.
    """
    name = _show(path, member)
    try:
        frame = _FrameUnpickler(io.BytesIO(_read_bytes(path, member))).load()
        if not isinstance(frame, pd.DataFrame):
            raise DataError(f"{name}: expected a pickled data frame, found {type(frame).__name__}")
        _check_blocks(frame)
        missing = [column for column in COLUMNS if column not in frame.columns]
        if missing:
            raise DataError(f"{name}: the data frame has no column {', '.join(missing)}")
        table = pa.Table.from_pandas(frame[list(COLUMNS)], preserve_index=False)
    except DataError:
        raise
    except Exception as error:
        # A broken or hostile pickle or zip can raise any exception.
        raise DataError(f"{name}: refused, not a plain pickled data frame ({error})") from None
    table = table.rename_columns(list(COLUMNS.values())).replace_schema_metadata()
    return table.append_column("split", pa.repeat(pa.scalar(split), table.num_rows))


def _check_blocks(frame: pd.DataFrame) -> None:
    """Check that a frame's blocks hold exactly its columns; otherwise pandas would write beyond its arrays.

    Raises:
        ValueError: they do not.
    """
    manager: Any = frame._mgr
    manager._verify_integrity()
    num_columns = len(frame.columns)
    if sum(len(block.mgr_locs) for block in manager.blocks) != num_columns:
        raise ValueError("the blocks do not match the columns")
    positions = [position for block in manager.blocks for position in block.mgr_locs.as_array.tolist()]
    if sorted(positions) != list(range(num_columns)):
        raise ValueError("the blocks do not match the columns")


def _read_bytes(path: Path, member: str | None) -> bytes:
    if member is None:
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(member).file_size > MAX_FILE_BYTES:
            raise DataError(f"{path}::{member}: unpacks to more than {MAX_FILE_BYTES >> 30} GiB")
        return archive.read(member)  # read into memory, so a member's path cannot lead outside a folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert a release and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m collm_dist.data.convert_collm_release" if __name__ == "__main__" else sys.argv[0],
        description="Convert the CoLLM authors' released pickles to interactions.parquet and items.parquet.",
        epilog="Then set dataset.path and dataset.items_path to the two files, as configs/ml1m_official.yaml does.",
    )
    parser.add_argument("source", type=Path, metavar="FOLDER_OR_ZIP", help=f"holds {', '.join(SPLIT_FILES.values())}")
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="where to write; created if missing")
    options = parser.parse_args(arguments)
    return run_reporting(
        lambda: print("\n".join(str(path) for path in convert_release(options.source, options.output_dir)))
    )


if __name__ == "__main__":
    sys.exit(main())
