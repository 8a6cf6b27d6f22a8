"""How much likelier a history makes a target's title: a score that a language model has before it is tuned.

score = 0.1 * (log p(title | prompt) - log p(title | prompt without a history))

The difference is the pointwise mutual information of history and title. The second term removes what makes a title
likely for everyone: its length, and how common its words are. Training needs the gradients of both: through the first
alone, weights would change how likely a title is for everyone, which changes no score, without end.

Shapes: M tree tokens, T predicted tokens, N targets, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from collm_dist.prompt_batch import PromptBatch

# Makes nats of a title logits of a like: a learned factor ended at 0.085 on purchases with titles of 17 tokens.
TITLE_SCALE = 0.1
# Tokens whose logits over the vocabulary exist at a time.
_CHUNK = 256


def count_logit_bytes(vocabulary: int) -> int:
    """Return the bytes of a chunk's float32 logits, their logarithms of probabilities, and the gradients of both."""
    return 4 * 4 * _CHUNK * vocabulary


def sum_title_logs(head: nn.Module, finish: Callable[[Tensor], Tensor], hidden: Tensor, batch: PromptBatch) -> Tensor:
    """Return the (N,) float32 log-likelihoods of the targets' titles, without their first token.

    Args:
        head: the language-modelling head, (T, D) -> (T, V).
        finish: scale and soft cap of the logits.
        hidden: (M, D) hidden states, correct at ``batch.title_places``.
        batch: the micro-batch.
    """

    def predict(states: Tensor, tokens: Tensor) -> Tensor:
        logs = finish(head(states).float()).log_softmax(-1)
        return logs.gather(1, tokens[:, None])[:, 0]

    places = batch.title_places
    states, tokens = hidden[places], batch.tree_ids[places + 1]
    parts: list[Any] = []
    for start in range(0, len(places), _CHUNK):
        chunk = states[start : start + _CHUNK], tokens[start : start + _CHUNK]
        # The logits are computed again in the backward pass: those of all titles would exceed all other memory.
        trains = torch.is_grad_enabled() and states.requires_grad
        parts.append(checkpoint(predict, *chunk, use_reentrant=False) if trains else predict(*chunk))
    sums = torch.zeros(len(batch.last), device=hidden.device)
    if not parts:  # titles of a single token, which have a gradient nonetheless: 0
        return sums + 0 * hidden.float().sum()
    return sums.index_add(0, batch.tree_targets[places], torch.cat(parts))


class TitlePriors:
    """Log-likelihoods of titles without a history, kept while weights cannot change."""

    def __init__(self, lay_out: Callable[[NDArray[np.int64]], PromptBatch]) -> None:
        """Start with none.

        Args:
            lay_out: returns the prompts of some items without a history.
        """
        self._lay_out = lay_out
        self._kept: dict[int, float] = {}

    def drop(self) -> None:
        """Forget all values: weights may have changed."""
        self._kept.clear()

    def find(self, batch: PromptBatch, compute: Callable[[PromptBatch], Tensor], *, keep: bool) -> Tensor:
        """Return the (N,) values of a micro-batch's targets; each item is computed once.

        Args:
            batch: the micro-batch.
            compute: returns the log-likelihoods of prompts.
            keep: whether to keep values for later calls, and to use those kept. They have no gradients.
        """
        device = batch.labels.device
        items, rows = np.unique(batch.target_items, return_inverse=True)
        if not keep:
            return compute(self._lay_out(items).to(device))[torch.from_numpy(rows).to(device)]
        missing = np.array([item for item in items.tolist() if item not in self._kept], dtype=np.int64)
        if len(missing):
            found = compute(self._lay_out(missing).to(device)).tolist()
            self._kept.update(zip(missing.tolist(), found, strict=True))
        values = torch.tensor([self._kept[item] for item in items.tolist()], dtype=torch.float32)
        return values[torch.from_numpy(rows)].to(device)
