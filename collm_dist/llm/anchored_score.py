"""Anchored score: a frozen anchor plus the language model's score, whose share is learned."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from collm_dist.runs.atomic_files import open_atomic
from collm_dist.runs.damage import name_damage

_PREFIX = "anchored_score."

# Adam moves every weight by about the learning rate per step. The gain must cover a range of about 1 within a few
# hundred steps, so it moves this many times as fast: with the learning rates of LoRA and of the mapping, and with those
# of all weights, which are several times lower.
GAIN_RATE, FULL_GAIN_RATE = 10.0, 50.0


class AnchoredScore(nn.Module):
    """score = anchor + rate * (gain * LLM + bias). Gain and bias start at 0, so the first score is the anchor.

    Attributes:
        rate: how many times as fast the score follows gain and bias.
    """

    def __init__(self, rate: float = GAIN_RATE) -> None:
        """Start at the anchor."""
        super().__init__()
        self.rate = rate
        # Not (): DeepSpeed cannot broadcast 0-dim parameters.
        self.gain = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, anchors_N: Tensor, scores_N: Tensor) -> Tensor:
        """Return the (N,) float32 scores of (N,) anchors and (N,) scores of the language model."""
        return anchors_N + self.rate * (self.gain.float() * scores_N + self.bias.float())

    def compute_bias(self) -> float:
        """Return the part of every score that depends on neither user nor item."""
        return float(self.rate * self.bias.float())


def save_anchored_score(path: Path, weights: dict[str, Tensor], rate: float) -> None:
    """Write gain and bias for ``GAIN_RATE``, whatever the rate of their training.

    Args:
        path: file to write.
        weights: trained weights of a ``CollmModel`` by parameter name; gain and bias are among them.
        rate: of their training.
    """
    own = {
        name.removeprefix(_PREFIX): value * (rate / GAIN_RATE)
        for name, value in weights.items()
        if name.startswith(_PREFIX)
    }
    with open_atomic(path, "wb") as file:
        file.write(safetensors.torch.save(own))


def load_anchored_score(anchored_score: AnchoredScore, path: Path) -> None:
    """Load a file of ``save_anchored_score`` into an anchored score of ``GAIN_RATE``.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    with name_damage(path, "restore it from a copy, or run stage 1 again with --force stage1"):
        anchored_score.load_state_dict(safetensors.torch.load_file(str(path)))
