"""Weight transfer from an earlier model: the fold before, or a run whose id tables today's extend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from collm_dist.cf.model_files import load_model
from collm_dist.cf.models import TrainableCfModel
from collm_dist.cf.user_shards import UserRanges
from collm_dist.runs.code_trust import read_model_name


def load_previous_weights(
    path: Path, name: str, model: TrainableCfModel, users: UserRanges, forgotten: Tensor
) -> tuple[Mapping[str, Tensor] | None, str]:
    """Return an earlier model's weights laid out for today's tables, and a log message.

    Args:
        path: model file of the earlier run, whose id tables are a prefix of today's.
        name: today's ``cf.model``.
        model: today's model, untrained.
        users: users that this worker owns.
        forgotten: indices of users whose rows are not taken over.

    Returns:
        Weights for ``copy_known_rows``, in which new rows are unknown; None if the models do not match.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    kind = read_model_name(path)  # first: loading another author's class would run its code
    if ":" in kind and kind != name:
        return None, f"{path} holds a model of the kind {kind}: training starts from initial weights"
    header, old = load_model(path)
    if header.model != name:
        return None, f"{path} holds a model of the kind {header.model}: training starts from initial weights"
    if old.items.text is not None or model.items.text is not None:
        return (
            None,
            f"{path}: text vectors of two runs do not match (cf.item_text): training starts from initial weights",
        )
    weights = {key: parameter.detach() for key, parameter in old.named_parameters()}
    num_items = len(old.items.known) - 1
    owned = users.to_dense()
    kept = (owned < len(old.users.known)) & ~torch.isin(owned, forgotten)
    for table, known, old_rows in (
        ("items", old.items.known, _map_item_rows(num_items, len(model.items.known))),
        ("users", old.users.known, torch.where(kept, owned, -1)),
    ):
        is_old = old_rows >= 0
        sources = old_rows.clamp(min=0)
        for key in [key for key in weights if key.startswith(f"{table}.")]:
            if len(weights[key]) == 0:
                weights[key] = torch.zeros(len(old_rows), *weights[key].shape[1:])
            else:
                weights[key] = weights[key][sources] * is_old[:, None]
        weights[f"{table}.known"] = is_old & (known[sources] if len(known) else is_old)
    parameters = dict(model.named_parameters())
    wrong = [key for key, new in parameters.items() if key not in weights or new.shape != weights[key].shape]
    if wrong or len(weights) != len(parameters) + 2:
        names = ", ".join(wrong) or "more weights"
        return None, f"{path} has other sizes ({names}): training starts from initial weights"
    return weights, f"training starts from the weights of {path}"


def _map_item_rows(num_old_items: int, num_rows: int) -> Tensor:
    """Return the old row of each row of today's item table, -1 = new. The unknown item's row is the last of both."""
    old_rows = torch.full((num_rows,), -1)
    old_rows[:num_old_items] = torch.arange(num_old_items)
    old_rows[-1] = num_old_items
    return old_rows


@torch.no_grad()
def copy_known_rows(model: TrainableCfModel, weights: Mapping[str, Tensor]) -> None:
    """Copy another training's weights into a model; table rows unknown to that training keep their own."""
    for name, parameter in model.named_parameters():
        old = weights[name].to(parameter.device)
        table = name.removesuffix(".weight")
        known = weights.get(f"{table}.known")
        if known is None:
            parameter.copy_(old)
        else:
            rows = known.to(parameter.device)[:, None]
            parameter.copy_(torch.where(rows, old, parameter))
