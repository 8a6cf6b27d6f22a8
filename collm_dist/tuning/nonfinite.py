"""Error and message for a loss or gradient that is not finite. Gathered only then, so a good step costs nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.distributed import gather_objects
from collm_dist.prompt_batch import PromptBatch

_MAX_SHOWN_ROWS = 20


def describe_nonfinite(
    step: int, block: ContextBlock, batches: Sequence[PromptBatch], finite_flags: Sequence[Tensor]
) -> str:
    """Describe which micro-batches of a step are not finite, by process and row id. Collective.

    Args:
        step: number of the step.
        block: its rows.
        batches: this rank's micro-batches.
        finite_flags: whether each of them is finite.
    """
    bad = [
        batch.row_ids[batch.weights > 0]
        for batch, is_finite in zip(batches, finite_flags, strict=True)
        if not is_finite
    ]
    bad_rows = gather_objects([int(row) for rows in bad for row in rows])
    places = [
        f"on process {rank} in the micro-batch of rows {_format_rows(rows)}"
        for rank, rows in enumerate(bad_rows)
        if rows
    ]
    where = "; ".join(places) or f"in the sum over all processes, of rows {_format_rows(block.row_id.tolist())}"
    return f"step {step}: the loss or a gradient is not finite, {where}; nothing was updated"


def _format_rows(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - _MAX_SHOWN_ROWS} more" if len(rows) > _MAX_SHOWN_ROWS else ""
    return ", ".join(map(str, rows[:_MAX_SHOWN_ROWS])) + more
