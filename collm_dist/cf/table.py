"""Vectors from elsewhere as a collaborative model: given, not trained; only biases and one gain are learned.

Shapes: U users owned, I items, C contexts, H history items, E width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collm_dist.cf.base import TrainableCfModel
from collm_dist.cf.rows import CfBatch
from collm_dist.errors import DataError


class VectorTable(TrainableCfModel):
    """logit(like) = global bias + user bias + item bias + gain * <user vector, item vector>.

    A user without a vector gets the mean of the liked items' vectors, so item vectors alone are enough. An item
    without one has zeros, as if nothing were known of it.
    """

    supports_tuning: ClassVar[bool] = False
    given: Tensor

    def __init__(self, num_users: int, num_items: int, *, embedding_dim: int, history_length: int) -> None:
        """Make empty tables; ``fill`` takes the vectors."""
        super().__init__(num_users, num_items, embedding_dim=embedding_dim, history_length=history_length, item_dim=0)
        self.gain = nn.Parameter(torch.zeros(1))
        self.register_buffer("given", torch.zeros(num_items + 1, embedding_dim))
        self.users.register_buffer("given", torch.zeros(num_users, embedding_dim))

    def fill(self, users_UE: NDArray[np.float32] | None, items_IE: NDArray[np.float32]) -> None:
        """Take the vectors; rows of zeros are ids without one."""
        if users_UE is not None:
            self.users.get_buffer("given").copy_(torch.from_numpy(users_UE))
        self.given[:-1] = torch.from_numpy(items_IE)

    def item_rows(self, item_idx: Tensor) -> Tensor:
        """(...) -> (..., E + 1): given vector, learned bias. A new item may have a vector, whatever training met."""
        inside = (item_idx >= 0) & (item_idx < len(self.given))
        vectors = self.given[torch.where(inside, item_idx, len(self.given) - 1)]
        return torch.cat([vectors, self.items(item_idx)], dim=-1)

    def compute_user_vectors(self, batch: CfBatch) -> Tensor:
        """Return (C, E)."""
        is_item = batch.history >= 0
        liked = self.item_rows(batch.history)[..., :-1] * is_item[..., None]
        means = liked.sum(dim=1) / is_item.sum(dim=1, keepdim=True).clamp(min=1)
        table = self.users.get_buffer("given")
        if len(table) == 0:
            return means
        vectors = table[batch.user_idx.clamp(0, len(table) - 1)] * (batch.user_idx >= 0)[:, None]
        return torch.where((vectors == 0).all(dim=1, keepdim=True), means, vectors)

    def match(self, users: Tensor, batch: CfBatch, items: Tensor) -> Tensor:
        """Return (B,) inner products times the gain."""
        return self.gain * super().match(users, batch, items)


def read_width(path: Path) -> int:
    """Return the width of the vectors in a Parquet file with columns ``id, vector``.

    Raises:
        DataError: the file is missing, empty, or has other columns.
    """
    if not path.exists():
        raise DataError(f"cf: {path} is missing; it should be a Parquet file with columns id, vector")
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"cf: {path} is no Parquet file ({error})") from error
    missing = {"id", "vector"} - set(file.schema_arrow.names)
    if missing:
        raise DataError(f"cf: {path} has no column {', '.join(sorted(missing))}; it has {file.schema_arrow.names}")
    for batch in file.iter_batches(1, columns=["vector"]):
        first = batch.column(0)[0].as_py()
        if not isinstance(first, list) or not first:
            raise DataError(f"cf: {path}, row 0, field 'vector': a list of numbers is needed, this is {first!r:.60}")
        return len(first)
    raise DataError(f"cf: {path} has no rows")


def read_vectors(path: Path, ids: Sequence[str], width: int) -> NDArray[np.float32]:
    """Read the vectors of some ids, streamed: what the file holds of others is passed over.

    Args:
        path: Parquet with columns id (any type; compared as text), vector (list of numbers).
        ids: raw ids, in the order of their indices.
        width: E.

    Returns:
        (len(ids), E); zeros for ids that the file lacks.

    Raises:
        DataError: a vector has another width or is not finite, or an id occurs twice; the message names the row.
    """
    found, seen, first = np.zeros((len(ids), width), np.float32), np.zeros(len(ids), bool), 0
    wanted = pa.array(ids, pa.string())
    for batch in pq.ParquetFile(path).iter_batches(1 << 16, columns=["id", "vector"]):
        vectors = batch.column("vector")
        lengths = pc.fill_null(pc.list_value_length(vectors), -1).to_numpy(zero_copy_only=False)
        if (lengths != width).any():
            row = int((lengths != width).argmax())
            raise DataError(f"cf: {path}, row {first + row}, field 'vector': {lengths[row]} numbers, not {width}")
        values = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width)
        if not (finite := np.isfinite(values).all(axis=1)).all():
            raise DataError(f"cf: {path}, row {first + int((~finite).argmax())}, field 'vector': not finite")
        places = pc.index_in(batch.column("id").cast(pa.string()), wanted)
        known = places.is_valid().to_numpy(zero_copy_only=False)
        rows = places.drop_null().to_numpy()
        again = seen[rows]
        again[np.setdiff1d(np.arange(len(rows)), np.unique(rows, return_index=True)[1])] = True
        if again.any():
            row = first + int(np.flatnonzero(known)[again.argmax()])
            raise DataError(f"cf: {path}, row {row}, field 'id': {ids[rows[again.argmax()]]!r} occurs twice")
        seen[rows], found[rows], first = True, values[known], first + batch.num_rows
    return found
