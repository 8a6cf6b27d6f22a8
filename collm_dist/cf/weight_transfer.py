"""A model of an earlier run as the start of today's: the same users and items, and some that are new since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from collm_dist.cf.model_files import load_model
from collm_dist.cf.models import TrainableCfModel
from collm_dist.cf.user_shards import UserRanges


def load_previous_weights(
    path: Path, name: str, model: TrainableCfModel, users: UserRanges, forgotten: Tensor
) -> tuple[Mapping[str, Tensor] | None, str]:
    """Return an earlier model's weights with the rows of today's tables, and a sentence about what was found.

    Args:
        path: the model file of the earlier run, whose id tables today's begin with.
        name: ``cf.model`` of today.
        model: of today, untrained.
        users: whom this worker owns.
        forgotten: indices of users whose rows are not taken.

    Returns:
        Weights as ``warm_start`` takes them, rows that are new being unknown; None where the models do not match.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    header, old = load_model(path)
    if header.model != name:
        return None, f"{path} is a model of the kind {header.model}: training begins from nothing"
    weights = {key: one.detach() for key, one in old.named_parameters()}
    num_items = len(old.items.known) - 1
    owned = users.to_dense()
    kept = (owned < len(old.users.known)) & ~torch.isin(owned, forgotten)
    for table, known, rows in (
        ("items", old.items.known, _place_items(num_items, len(model.items.known))),
        ("users", old.users.known, torch.where(kept, owned, -1)),
    ):
        found = rows >= 0
        taken = rows.clamp(min=0)
        for key in [one for one in weights if one.startswith(f"{table}.")]:
            if len(weights[key]) == 0:
                weights[key] = torch.zeros(len(rows), *weights[key].shape[1:])
            else:
                weights[key] = weights[key][taken] * found[:, None]
        weights[f"{table}.known"] = found & (known[taken] if len(known) else found)
    wrong = [key for key, one in model.named_parameters() if key not in weights or one.shape != weights[key].shape]
    if wrong or len(weights) != len(dict(model.named_parameters())) + 2:
        return None, f"{path} has other sizes ({', '.join(wrong) or 'more weights'}): training begins from nothing"
    return weights, f"training begins with the weights of {path}"


def _place_items(before: int, rows: int) -> Tensor:
    """Return for each row of today's item table its row of then, -1 = none; the unknown item's is the last of both."""
    places = torch.full((rows,), -1)
    places[:before] = torch.arange(before)
    places[-1] = before
    return places
