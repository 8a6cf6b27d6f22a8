"""External vectors as a CF model: vectors are frozen; biases and one gain are learned.

Shapes: U users owned, I items, C contexts, H history items, E width of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collm_dist.cf.batches import CfBatch
from collm_dist.cf.models.interface import TrainableCfModel
from collm_dist.data.ingest.id_forms import match_forms
from collm_dist.data.ingest.normalize import to_ids
from collm_dist.errors import DataError


class VectorTable(TrainableCfModel):
    """logit(like) = global bias + user bias + item bias + gain * <user vector, item vector>.

    A user without a vector gets the mean of the liked items' vectors, so item vectors alone suffice. An item without a
    vector gets zeros.
    """

    supports_tuning: ClassVar[bool] = False
    given: Tensor

    def __init__(self, num_users: int, num_items: int, *, embedding_dim: int, history_length: int) -> None:
        """Build empty tables; ``fill`` sets the vectors."""
        super().__init__(num_users, num_items, embedding_dim=embedding_dim, history_length=history_length, item_dim=0)
        self.gain = nn.Parameter(torch.zeros(1))
        self.register_buffer("given", torch.zeros(num_items + 1, embedding_dim))
        self.users.register_buffer("given", torch.zeros(num_users, embedding_dim))

    def fill(self, users_UE: NDArray[np.float32] | None, items_IE: NDArray[np.float32]) -> None:
        """Set the vectors; rows of zeros are ids without a vector."""
        if users_UE is not None:
            self.users.get_buffer("given").copy_(torch.from_numpy(users_UE))
        self.given[:-1] = torch.from_numpy(items_IE)

    def item_rows(self, item_idx: Tensor) -> Tensor:
        """(...) -> (..., E + 1): given vector, learned bias. Items without training rows may have a vector."""
        return torch.cat([self._look_up(item_idx), self.items(item_idx)], dim=-1)

    def _look_up(self, item_idx: Tensor) -> Tensor:
        """(...) -> (..., E): given vectors, zeros for items without one."""
        inside = (item_idx >= 0) & (item_idx < len(self.given))
        return self.given[torch.where(inside, item_idx, len(self.given) - 1)]

    def compute_user_vectors(self, batch: CfBatch) -> Tensor:
        """Return the (C, E) vectors of users, or the means of their liked items."""
        is_item = batch.history >= 0
        liked = self._look_up(batch.history)  # zeros at the padding
        means = liked.sum(dim=1) / is_item.sum(dim=1, keepdim=True).clamp(min=1)
        table = self.users.get_buffer("given")
        if len(table) == 0:
            return means
        vectors = table[batch.user_idx.clamp(0, len(table) - 1)] * (batch.user_idx >= 0)[:, None]
        return torch.where((vectors == 0).all(dim=1, keepdim=True), means, vectors)

    def compute_queries(self, batch: CfBatch) -> Tensor:
        """Return (C, E + 1) vectors whose inner products with ``item_rows`` are the logits, up to a user's constant."""
        users = self.gain * self.compute_user_vectors(batch)
        return torch.cat([users, users.new_ones(len(users), 1)], dim=1)

    def match(self, users: Tensor, batch: CfBatch, items: Tensor) -> Tensor:
        """Return the (B,) inner products times the gain."""
        return self.gain * super().match(users, batch, items)


def read_width(path: Path) -> int:
    """Return the width of the vectors in a Parquet file with columns ``id, vector``.

    Raises:
        DataError: the file is missing, damaged or empty, or has other columns.
    """
    for batch in _iter_batches(path, 1):
        width = len(batch.column("vector")[0].as_py() or [])
        if width == 0:
            raise DataError(f"cf: {path}, row 0, field 'vector': it is empty; leave out ids without a vector")
        return width
    raise DataError(f"cf: {path} has no rows; it needs a row with columns id, vector for each id")


def _iter_batches(path: Path, rows: int) -> Iterator[pa.RecordBatch]:
    """Yield batches of the columns id and vector, after checking them."""
    if not path.is_file():
        raise DataError(f"cf: {path} is missing; it should be a Parquet file with columns id, vector")
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        missing = {"id", "vector"} - set(schema.names)
        if missing:
            raise DataError(f"cf: {path} has no column {', '.join(sorted(missing))}, it has {', '.join(schema.names)}; "
                            "rename them to id and vector")  # fmt: skip
        kind = schema.field("vector").type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
            raise DataError(f"cf: {path}, row 0, field 'vector': the column is of type {kind}; make it a list of "
                            "numbers in each row")  # fmt: skip
        yield from file.iter_batches(rows, columns=["id", "vector"])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cf: {path} is damaged or not a Parquet file ({error}); write it again") from error


def read_vectors(path: Path, ids: Sequence[str], width: int) -> NDArray[np.float32]:
    """Read the vectors of some ids as a stream; other ids in the file are skipped.

    Args:
        path: Parquet file with columns id (any type; compared as ids of a request are), vector (list of numbers).
        ids: raw ids in the order of their indices.
        width: E.

    Returns:
        (len(ids), E); zeros for ids missing in the file.

    Raises:
        DataError: a vector has another width or is not finite, or an id occurs twice; the message names the row.
    """
    vectors, seen, first = np.zeros((len(ids), width), np.float32), np.zeros(len(ids), bool), 0
    known_ids = pa.array(ids, pa.string())
    for batch in _iter_batches(path, 1 << 16):
        values = _read_numbers(batch.column("vector"), width, f"cf: {path}", first)
        row_ids = match_forms(to_ids(batch.column("id")), known_ids)
        if row_ids.null_count:
            row = first + int(row_ids.is_null().to_numpy(zero_copy_only=False).argmax())
            raise DataError(f"cf: {path}, row {row}, field 'id': it is empty; set it or leave the row out")
        places = pc.index_in(row_ids, known_ids)
        known = places.is_valid().to_numpy(zero_copy_only=False)
        rows = places.drop_null().to_numpy()
        is_duplicate = seen[rows]
        is_duplicate[np.setdiff1d(np.arange(len(rows)), np.unique(rows, return_index=True)[1])] = True
        if is_duplicate.any():
            row = first + int(np.flatnonzero(known)[is_duplicate.argmax()])
            raise DataError(f"cf: {path}, row {row}, field 'id': {ids[rows[is_duplicate.argmax()]]!r} occurs twice; "
                            "keep one row for each id")  # fmt: skip
        seen[rows], vectors[rows], first = True, values[known], first + batch.num_rows
    return vectors


def _read_numbers(vectors: pa.Array, width: int, place: str, first: int) -> NDArray[np.float32]:
    """Return the (R, E) vectors of a batch whose first row has the number ``first``."""
    lengths = pc.fill_null(pc.list_value_length(vectors), 0).to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        row = int((lengths != width).argmax())
        raise DataError(f"{place}, row {first + row}, field 'vector': {lengths[row]} numbers, not {width}; all vectors "
                        "of items and users need the same length; leave out ids without a vector")  # fmt: skip
    with np.errstate(over="ignore"):  # values too large for float32 are reported below
        values: NDArray[np.float32] = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    values = values.reshape(-1, width)
    if not (finite := np.isfinite(values).all(axis=1)).all():
        row = first + int((~finite).argmax())
        raise DataError(f"{place}, row {row}, field 'vector': not finite in float32; correct it or leave the row out")
    return values
