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
# hundred steps, so it moves this many times as fast.
_RATE = 10.0


class AnchoredScore(nn.Module):
    """score = anchor + gain * LLM + bias. Gain and bias start at 0, so the first score is the anchor."""

    def __init__(self) -> None:
        """Start at the anchor."""
        super().__init__()
        # Not (): DeepSpeed cannot broadcast 0-dim parameters.
        self.gain = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, anchors_N: Tensor, scores_N: Tensor) -> Tensor:
        """Return the (N,) float32 scores of (N,) anchors and (N,) scores of the language model."""
        return anchors_N + _RATE * (self.gain.float() * scores_N + self.bias.float())

    def compute_bias(self) -> float:
        """Return the part of every score that depends on neither user nor item."""
        return float(_RATE * self.bias.float())


def save_anchored_score(path: Path, weights: dict[str, Tensor]) -> None:
    """Write gain and bias, among the trained weights of a ``CollmModel`` by parameter name."""
    own = {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)}
    with open_atomic(path, "wb") as file:
        file.write(safetensors.torch.save(own))


def load_anchored_score(anchored_score: AnchoredScore, path: Path) -> None:
    """Load a file of ``save_anchored_score``.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    with name_damage(path, "restore it from a copy, or run stage 1 again with --force stage1"):
        anchored_score.load_state_dict(safetensors.torch.load_file(str(path)))
