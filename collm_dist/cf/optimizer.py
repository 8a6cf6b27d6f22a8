"""Adam for dense parameters, combined with Adam of single rows for embedding tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from collm_dist.cf.embedding_tables import EmbeddingTable

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
BETAS, EPSILON = (0.9, 0.999), 1e-8  # PyTorch's defaults


class RowAdam:
    """Adam whose step updates only the rows of a sparse gradient; the same numbers as ``torch.optim.SparseAdam``.

    It reads and writes each row of the weights and of both moments once.

    Attributes:
        state: of each parameter: ``step``, ``exp_avg`` and ``exp_avg_sq``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], learning_rate: float) -> None:
        """Start without state."""
        self.parameters, self.learning_rate = parameters, learning_rate
        self.state: dict[nn.Parameter, dict[str, Any]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Update the rows."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                gradient = parameter.grad.coalesce()
                self._update(parameter, gradient.indices()[0], gradient.values())

    def _update(self, parameter: nn.Parameter, rows: Tensor, gradients: Tensor) -> None:
        """Update (R,) rows by their (R, E) gradients."""
        if parameter not in self.state:
            zeros = {moment: torch.zeros_like(parameter) for moment in MOMENTS[1:]}
            self.state[parameter] = {"step": 0, **zeros}
        state = self.state[parameter]
        state["step"] += 1
        mean = _move_rows(state["exp_avg"], rows, gradients, 1 - BETAS[0])
        square = _move_rows(state["exp_avg_sq"], rows, gradients.square(), 1 - BETAS[1])
        corrections = [1 - beta ** state["step"] for beta in BETAS]
        size = self.learning_rate * math.sqrt(corrections[1]) / corrections[0]
        parameter.index_add_(0, rows, mean.div_(square.sqrt_().add_(EPSILON)).mul_(-size))


def _move_rows(table: Tensor, rows: Tensor, targets: Tensor, share: float) -> Tensor:
    """Move (R,) rows of a table towards (R, E) targets by a share of the distance, and return them."""
    old = table.index_select(0, rows)
    new = (targets - old).mul_(share).add_(old)
    table.index_copy_(0, rows, new)
    return new


class Optimizers:
    """Both optimizers of a model; their state is read and set by parameter name."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        """Assign each parameter to one of the optimizers."""
        sparse_ids = {
            id(module.weight) for module in model.modules() if isinstance(module, EmbeddingTable) and module.sparse
        }
        named = dict(model.named_parameters())
        self._tables = {name: parameter for name, parameter in named.items() if id(parameter) in sparse_ids}
        self._layers = {name: parameter for name, parameter in named.items() if id(parameter) not in sparse_ids}
        self._row_adam = RowAdam(list(self._tables.values()), learning_rate)
        self._adam = torch.optim.Adam(list(self._layers.values()), lr=learning_rate)

    def zero_grad(self) -> None:
        """Reset gradients. Dense ones become zero instead of None, so that all workers have the same to reduce."""
        for parameter in self._tables.values():
            parameter.grad = None
        for parameter in self._layers.values():
            parameter.grad = torch.zeros_like(parameter)

    def step(self) -> None:
        """Update the weights."""
        self._adam.step()
        self._row_adam.step()

    def get_moments(self) -> dict[str, Tensor]:
        """Return the optimizer state as ``moment.parameter`` tensors."""
        moments = {}
        for parameters, state in ((self._layers, self._adam.state), (self._tables, self._row_adam.state)):
            for name, parameter in parameters.items():
                for moment, value in state.get(parameter, {}).items():
                    moments[f"{moment}.{name}"] = torch.as_tensor(value, dtype=torch.float32)
        return moments

    def set_moments(self, tensors: dict[str, Tensor]) -> None:
        """Set the optimizer state from ``get_moments``."""
        for name, parameter in (self._layers | self._tables).items():
            if f"step.{name}" not in tensors:
                continue
            state: dict[str, Any] = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
            if name in self._tables:
                self._row_adam.state[parameter] = state | {"step": int(state["step"])}
            else:
                self._adam.state[parameter] = state
