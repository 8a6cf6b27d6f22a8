"""The mapping from collaborative vectors to the language model's input embeddings (CoLLM, section 3.2.2).

Shapes: S slots, E width of a collaborative vector, F pair features, K soft tokens a slot, D model width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from collm_dist.runs.atomic_files import open_atomic
from collm_dist.runs.damage import name_damage


class MappingMLP(nn.Module):
    """``Linear(E, m E) -> ReLU -> Linear(m E, K D)``: maps a vector to K soft tokens."""

    def __init__(self, in_dim: int, llm_dim: int, hidden_multiple: int, tokens_per_slot: int, out_scale: float) -> None:
        """Draw the weights so that soft tokens start at the size of the model's own token embeddings.

        Args:
            in_dim, llm_dim: E and D.
            hidden_multiple: m.
            tokens_per_slot: K.
            out_scale: root mean square of a token embedding's entries. Much larger soft tokens would swamp the text
                around them from the first step; much smaller ones would have no effect.
        """
        super().__init__()
        self.tokens_per_slot = tokens_per_slot
        self.hidden = nn.Linear(in_dim, hidden_multiple * in_dim)
        self.out = nn.Linear(hidden_multiple * in_dim, tokens_per_slot * llm_dim)
        # Inputs have about unit norm, so weights of variance 1 give hidden units of variance ~1, and the ReLU halves
        # their second moment; the second layer divides by its fan-in.
        nn.init.normal_(self.hidden.weight, std=1.0)
        nn.init.zeros_(self.hidden.bias)
        nn.init.normal_(self.out.weight, std=out_scale * (2.0 / (hidden_multiple * in_dim)) ** 0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, vectors_SE: Tensor) -> Tensor:
        """Map (S, E) vectors to (S, K, D) soft tokens."""
        mapped: Tensor = self.out(torch.relu(self.hidden(vectors_SE)))
        return mapped.view(len(vectors_SE), self.tokens_per_slot, -1)


class SlotMapper(nn.Module):
    """One mapping shared by users and items, as in the paper, and one for the statistics of a user-item pair."""

    def __init__(
        self,
        *,
        cf_dim: int | None,
        pair_dim: int | None,
        llm_dim: int,
        hidden_multiple: int,
        tokens_per_slot: int,
        out_scale: float,
        seed: int,
    ) -> None:
        """Build the mappings that the prompt's slots need.

        Args:
            cf_dim: E, or None if no slot reads collaborative vectors.
            pair_dim: F, or None if the prompt has no pair slot.
            llm_dim, hidden_multiple, tokens_per_slot, out_scale: see ``MappingMLP``.
            seed: of the initial weights.
        """
        super().__init__()
        self.tokens_per_slot = tokens_per_slot
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)

            def build(in_dim: int | None) -> MappingMLP | None:
                if in_dim is None:
                    return None
                return MappingMLP(in_dim, llm_dim, hidden_multiple, tokens_per_slot, out_scale)

            self.cf = build(cf_dim)
            self.pair = build(pair_dim)


def map_vectors(weights: dict[str, Tensor], vectors_NE: Tensor) -> Tensor:
    """Map (N, E) collaborative vectors to (N, K D) soft tokens, with the weights that ``save_mapper`` writes.

    A module wrapped by DeepSpeed runs on all processes together or not at all; this function runs on any of them.
    """
    prefix = "slot_mapper.cf."
    weights = {name.removeprefix(prefix): value.float() for name, value in weights.items() if name.startswith(prefix)}
    hidden = torch.relu(functional.linear(vectors_NE, weights["hidden.weight"], weights["hidden.bias"]))
    return functional.linear(hidden, weights["out.weight"], weights["out.bias"])


def save_mapper(path: Path, weights: dict[str, Tensor]) -> Path:
    """Write the weights that stage 2 trained: the mapping's, and the collaborative model's if it trained too."""
    with open_atomic(path, "wb") as file:
        file.write(safetensors.torch.save({name: value.contiguous() for name, value in weights.items()}))
    return path


def load_mapper(mapper: SlotMapper | None, cf_model: Any, path: Path, anchored_score: nn.Module | None = None) -> None:
    """Load a file of ``save_mapper`` into a mapper and, if they were trained too, a collaborative model and a gain.

    Raises:
        ArtifactError: the file is missing or does not fit.
    """
    with name_damage(path, "restore it from a copy, or run stage 2 again with --force stage2"):
        weights = safetensors.torch.load_file(str(path))
        modules = {"slot_mapper.": mapper, "cf_model.": cf_model, "anchored_score.": anchored_score}
        for prefix, module in modules.items():
            part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            if module is not None and (part or prefix == "anchored_score."):
                module.load_state_dict(part, strict=prefix != "cf_model.")
