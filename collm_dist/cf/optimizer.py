"""Adam for dense parameters and SparseAdam for the rows of tables, as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from collm_dist.cf.embedding_tables import Table

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Optimizers:
    """Both optimizers of a model, with moments that can be taken out and put back by the parameters' names."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        """Divide the parameters."""
        self._names = dict(model.named_parameters())
        tables = {id(one.weight) for one in model.modules() if isinstance(one, Table) and one.sparse}
        sparse = [one for one in self._names.values() if id(one) in tables]
        dense = [one for one in self._names.values() if id(one) not in tables]
        self._sparse = torch.optim.SparseAdam(sparse, lr=learning_rate) if sparse else None
        self._all: list[torch.optim.Optimizer] = [torch.optim.Adam(dense, lr=learning_rate)]
        if self._sparse is not None:
            self._all.append(self._sparse)

    def zero_grad(self) -> None:
        """Forget the gradients of the step before; dense ones become zero, so that all workers have some."""
        for optimizer in self._all:
            for parameter in (one for group in optimizer.param_groups for one in group["params"]):
                parameter.grad = None if optimizer is self._sparse else torch.zeros_like(parameter)

    def step(self) -> None:
        """Update the weights."""
        for optimizer in self._all:
            optimizer.step()

    def get_moments(self) -> dict[str, Tensor]:
        """Return the state as ``moment.parameter`` tensors."""
        found = {}
        for optimizer in self._all:
            for name, parameter in self._names.items():
                for moment, value in optimizer.state.get(parameter, {}).items():
                    found[f"{moment}.{name}"] = torch.as_tensor(value, dtype=torch.float32)
        return found

    def set_moments(self, tensors: dict[str, Tensor]) -> None:
        """Take a state that ``get_moments`` gave."""
        for optimizer in self._all:
            owned = {id(one) for group in optimizer.param_groups for one in group["params"]}
            for name, parameter in self._names.items():
                if id(parameter) not in owned or f"step.{name}" not in tensors:
                    continue
                state: dict[str, Any] = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
                if optimizer is self._sparse:
                    state |= {"step": int(state["step"])}
                optimizer.state[parameter] = state
