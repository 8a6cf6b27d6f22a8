"""Slots without LLM: an MLP on exactly the numbers that the slots of stage 2 carry.

Without an anchor, the gain of stage 2 over it is the contribution of the language model and the text; the anchor is not
among its inputs. It is trained on the same rows as stage 2 and stops early on the same validation rows.

Shapes: C contexts, N targets, H history items, E width of a collaborative vector, X inputs.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collm_dist.data.shards.context_block import IntArray
from collm_dist.metrics import FloatArray, compute_auc, compute_logloss


class SlotsMlp(nn.Module):
    """Standardization, then ``Linear -> ReLU -> Dropout -> Linear`` to one logit."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean_X: Tensor, scale_X: Tensor, hidden_dim: int, dropout: float) -> None:
        """Build the layers, given the mean and standard deviation of each input over the training rows."""
        super().__init__()
        self.register_buffer("mean", mean_X)
        self.register_buffer("scale", scale_X)
        self.layers = nn.Sequential(
            nn.Linear(len(mean_X), hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, 1)
        )

    def forward(self, inputs_NX: Tensor) -> Tensor:
        """Map (N, X) inputs to (N,) logits."""
        logits: Tensor = self.layers((inputs_NX - self.mean) / self.scale).squeeze(1)
        return logits

    @torch.no_grad()
    def score(self, inputs: NDArray[np.float32]) -> FloatArray:
        """Return (N,) logits of (N, X) inputs, without dropout."""
        self.eval()
        return np.asarray(self(torch.from_numpy(inputs)).double().numpy())


def fit_slots_mlp(
    train: tuple[NDArray[np.float32], IntArray],
    valid: tuple[NDArray[np.float32], IntArray],
    seed: int,
    *,
    hidden_dim: int = 64,
    dropout: float = 0.1,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    batch_size: int = 256,
    num_epochs: int = 50,
    patience: int = 5,
) -> SlotsMlp:
    """Fit by BCE with AdamW and keep the epoch with the best validation AUC (log-loss if AUC is not defined).

    Args:
        train, valid: (N, X) inputs and (N,) labels.
        seed: of initial weights, order and dropout.
        hidden_dim, dropout, learning_rate, weight_decay, batch_size: as usual.
        num_epochs: maximum number of epochs.
        patience: epochs without improvement before stopping.
    """
    inputs, labels = torch.from_numpy(train[0]), torch.from_numpy(train[1]).float()
    scale = inputs.std(dim=0, correction=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SlotsMlp(inputs.mean(dim=0), torch.where(scale > 1e-6, scale, 1.0), hidden_dim, dropout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
        best, best_state, best_epoch = -np.inf, copy.deepcopy(model.state_dict()), 0
        for epoch in range(num_epochs):
            model.train()
            order = torch.randperm(len(labels))
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                loss = nn.functional.binary_cross_entropy_with_logits(model(inputs[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            quality = _compute_quality(valid[1], model.score(valid[0]))
            if quality > best:
                best, best_state, best_epoch = quality, copy.deepcopy(model.state_dict()), epoch
            elif epoch - best_epoch >= patience:
                break
    model.load_state_dict(best_state)
    return model


def _compute_quality(labels: IntArray, scores: FloatArray) -> float:
    """Return the AUC, or minus the log-loss if only one label occurs: higher is better."""
    auc = compute_auc(labels, scores)
    if auc is not None:
        return auc
    return -(compute_logloss(labels, scores) or 0.0)
