"""The CoLLM authors' released files: pickled data frames, read by an unpickler that can build nothing else.

A pickle is a program. This one may name only what pandas and numpy need to put a data frame together; anything else,
such as a call to the operating system, is refused before it runs.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.compat.pickle_compat import Unpickler as PandasUnpickler

from collm_dist.errors import DataError

# Where a split's rows are, in the order of time, which is the order of the rows.
SPLIT_FILES = {"train": "train_ood2.pkl", "valid": "valid_ood2.pkl", "test": "test_ood2.pkl"}
COLUMNS = ("uid", "iid", "title", "label", "timestamp")
MAX_BYTES = 8 << 30

_ALLOWED = {
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
    """Pandas' own unpickler, which knows the names of older releases, held to an allow-list."""

    dispatch: ClassVar[dict[int, Any]] = PandasUnpickler.dispatch.copy()

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a data frame")
        if name == "_restore_array":
            return _restore_array
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set an object's state; numpy believes what a pickle says of a type's flags, so that it must be true."""
        found, state = self.stack[-2:]
        if isinstance(found, np.dtype) and (state[2:5] != (None, None, None) or state[7] != found.flags):
            raise pickle.UnpicklingError(f"the state of {found} is not its own")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _restore_array(data: Any) -> Any:
    """Return the Arrow array of a pickle; one that says of its buffers what is not so would be read past their ends."""
    array = pa.lib._restore_array(data)
    array.validate(full=True)
    return array


def list_released_files(path: str) -> list[str]:
    """Return a name for each split's file in the authors' folder or zip, in the order train, valid, test.

    Raises:
        DataError: one is missing or there are two; the message names it.
    """
    place = Path(path).expanduser()
    if place.is_file() and zipfile.is_zipfile(place):
        try:
            with zipfile.ZipFile(place) as archive:
                names = [(Path(name).name, f"{place}::{name}") for name in archive.namelist()]
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise DataError(f"{path}: the zip cannot be read: {error}") from None
    else:
        names = [(one.name, str(one)) for one in sorted(place.rglob("*.pkl"))]
    found = dict(names)
    twice = [place for name, place in names if name in SPLIT_FILES.values() and found[name] != place]
    if twice:
        raise DataError(
            f"dataset.path: '{path}' has {twice[0]} and {found[Path(twice[0]).name]}; name the folder of one"
        )
    missing = [name for name in SPLIT_FILES.values() if name not in found]
    if missing:
        raise DataError(f"dataset.path: '{path}' has no {', '.join(missing)} (format collm: a folder or zip of CoLLM's "
                        "released pickles)")  # fmt: skip
    return [found[name] for name in SPLIT_FILES.values()]


def read_released_table(name: str) -> Any:
    """Read one split's file as a table ``uid, iid, title, label, timestamp, split``.

    Raises:
        DataError: it is no pickled data frame, or tries to be more than that.
    """
    try:
        frame = _FrameUnpickler(io.BytesIO(_read_bytes(name))).load()
        if not isinstance(frame, pd.DataFrame):
            raise DataError(f"{name}: holds no data frame but {type(frame).__name__}")
        _check_blocks(frame)
        missing = [column for column in COLUMNS if column not in frame.columns]
        if missing:
            raise DataError(f"{name}: the data frame has no column {', '.join(missing)}")
        table = pa.Table.from_pandas(frame[list(COLUMNS)], preserve_index=False)
    except DataError:
        raise
    except Exception as error:
        # A broken or hostile pickle, or zip, can fail in any way that its own instructions choose.
        raise DataError(f"{name}: refused, it is no plain pickled data frame ({error})") from None
    split = next(split for split, file in SPLIT_FILES.items() if name.endswith(file))
    return table.append_column("split", pa.repeat(pa.scalar(split), table.num_rows))


def _check_blocks(frame: pd.DataFrame) -> None:
    """Refuse a frame whose blocks say that they hold columns which are not there: pandas would write beyond its arrays.

    Raises:
        ValueError: it is one.
    """
    manager: Any = frame._mgr
    manager._verify_integrity()
    count = len(frame.columns)
    if sum(len(block.mgr_locs) for block in manager.blocks) != count:
        raise ValueError("blocks of other columns")
    places = [place for block in manager.blocks for place in block.mgr_locs.as_array.tolist()]
    if sorted(places) != list(range(count)):
        raise ValueError("blocks of other columns")


def _read_bytes(name: str) -> bytes:
    outer, _, member = name.partition("::")
    if not member:
        return Path(outer).read_bytes()
    with zipfile.ZipFile(outer) as archive:
        if archive.getinfo(member).file_size > MAX_BYTES:
            raise DataError(f"{name}: unpacks to more than {MAX_BYTES >> 30} GiB")
        return archive.read(member)  # nothing is unpacked to disk, so no name can lead anywhere
