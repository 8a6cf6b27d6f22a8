"""Adam for dense parameters, combined with SparseAdam for embedding tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from collm_dist.cf.embedding_tables import EmbeddingTable

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Optimizers:
    """Both optimizers of a model; their state is read and set by parameter name."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        """Assign each parameter to one of the optimizers."""
        self._names = dict(model.named_parameters())
        sparse_ids = {
            id(module.weight) for module in model.modules() if isinstance(module, EmbeddingTable) and module.sparse
        }
        parameters = list(self._names.values())
        sparse = [parameter for parameter in parameters if id(parameter) in sparse_ids]
        dense = [parameter for parameter in parameters if id(parameter) not in sparse_ids]
        self._sparse = torch.optim.SparseAdam(sparse, lr=learning_rate) if sparse else None
        self._all: list[torch.optim.Optimizer] = [torch.optim.Adam(dense, lr=learning_rate)]
        if self._sparse is not None:
            self._all.append(self._sparse)

    def zero_grad(self) -> None:
        """Reset gradients. Dense ones become zero instead of None, so that all workers have the same to reduce."""
        for optimizer in self._all:
            for parameter in _list_parameters(optimizer):
                parameter.grad = None if optimizer is self._sparse else torch.zeros_like(parameter)

    def step(self) -> None:
        """Update the weights."""
        for optimizer in self._all:
            optimizer.step()

    def get_moments(self) -> dict[str, Tensor]:
        """Return the optimizer state as ``moment.parameter`` tensors."""
        moments = {}
        for optimizer in self._all:
            for name, parameter in self._names.items():
                for moment, value in optimizer.state.get(parameter, {}).items():
                    moments[f"{moment}.{name}"] = torch.as_tensor(value, dtype=torch.float32)
        return moments

    def set_moments(self, tensors: dict[str, Tensor]) -> None:
        """Set the optimizer state from ``get_moments``."""
        for optimizer in self._all:
            owned_ids = {id(parameter) for parameter in _list_parameters(optimizer)}
            for name, parameter in self._names.items():
                if id(parameter) not in owned_ids or f"step.{name}" not in tensors:
                    continue
                state: dict[str, Any] = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
                if optimizer is self._sparse:
                    state |= {"step": int(state["step"])}
                optimizer.state[parameter] = state


def _list_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
