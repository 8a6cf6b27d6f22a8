"""The training state of a CF model in one safetensors file: weights, best weights, Adam's moments, progress."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from collm_dist.artifacts import open_atomic
from collm_dist.errors import CheckpointError

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
TensorDict = dict[str, Tensor]


@dataclass
class Progress:
    """How far training is.

    Attributes:
        epoch: passes done; the first is 1.
        best_epoch: the pass after which the weights were best, 0 = none yet.
        best_metrics: validation metrics then.
        finished: whether training has ended.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    finished: bool = False


def save_state(
    path: Path, key: str, model: nn.Module, optimizer: torch.optim.Adam, best: TensorDict, progress: Progress
) -> None:
    """Write the state; a reader sees the one before or this one, never a part.

    Args:
        path: where to.
        key: names what the training depends on; a state of another key is not continued.
        model, optimizer: as they are.
        best: the model's state dict at its best epoch.
        progress: how far training is.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for name, parameter in model.named_parameters():
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"key": key, "progress": json.dumps(asdict(progress))}
    with open_atomic(path, "wb") as file:
        file.write(safetensors.torch.save(tensors, metadata))


def read_state(path: Path, key: str) -> tuple[TensorDict, Progress] | None:
    """Read a state; None if there is none, or one that was made from something else.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata["key"] != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, Progress(**json.loads(metadata["progress"]))
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete it and start the step again") from error


def restore_state(tensors: TensorDict, model: nn.Module, optimizer: torch.optim.Adam) -> TensorDict:
    """Put a state back into model and optimizer and return the best weights."""
    model.load_state_dict(take_group(tensors, "model"))
    moments = {moment: take_group(tensors, moment) for moment in _MOMENTS}
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {moment: values[name].to(parameter.device) for moment, values in moments.items()}
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in take_group(tensors, "best").items()}


def take_group(tensors: TensorDict, group: str) -> TensorDict:
    """Return the tensors of a group (model, best, or a moment) under the model's own names."""
    prefix = group + "."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
