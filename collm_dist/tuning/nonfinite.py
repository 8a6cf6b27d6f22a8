"""What to say where a loss or a gradient is no finite number. Gathered only then: a good step pays nothing for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.distributed import gather_objects
from collm_dist.errors import CollmError
from collm_dist.prompt_batch import PromptBatch

_MOST_ROWS = 20


class NonFiniteError(CollmError):
    """The loss or a gradient is no finite number; nothing was updated with it."""

    exit_code = 4
    is_common = True


def describe_nonfinite(step: int, block: ContextBlock, batches: Sequence[PromptBatch], finite: Sequence[Tensor]) -> str:
    """Return where the numbers of a step are not finite, by process and row id. Collective.

    Args:
        step: in question.
        block: its rows.
        batches: this process's micro-batches.
        finite: whether each of them is.
    """
    bad = [batch.row_ids[batch.weights > 0] for batch, good in zip(batches, finite, strict=True) if not good]
    bad_rows = gather_objects([int(row) for rows in bad for row in rows])
    places = [
        f"on process {rank} in the micro-batch of rows {_list(rows)}" for rank, rows in enumerate(bad_rows) if rows
    ]
    where = "; ".join(places) or f"in the sum over all processes, of rows {_list(block.row_id.tolist())}"
    return f"step {step}: the loss or a gradient is not finite, {where}; nothing was updated"


def _list(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - _MOST_ROWS} more" if len(rows) > _MOST_ROWS else ""
    return ", ".join(map(str, rows[:_MOST_ROWS])) + more
