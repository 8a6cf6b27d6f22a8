"""Sharded checkpoint of a CF training: one file per worker, and a record that names them, written last.

A worker's file holds the rows of the users that it owns, with Adam's moments; the first worker's file also holds the
shared tensors. Any number of workers can read a state: rows are found by user.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch.distributed as dist
from torch import Tensor, nn

from collm_dist.cf.models.interface import is_local
from collm_dist.cf.optimizer import Optimizers
from collm_dist.cf.user_shards import UserRanges
from collm_dist.distributed import get_rank, get_world_size
from collm_dist.errors import CheckpointError
from collm_dist.runs.atomic_files import open_atomic, write_json

RECORD = "state.json"
TensorDict = dict[str, Tensor]


@dataclass
class Progress:
    """Progress of a training.

    Attributes:
        epoch: epochs done; the first is 1.
        best_epoch: epoch with the best weights, 0 = none yet.
        best_metrics: metrics after that epoch.
        finished: whether training has ended.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    finished: bool = False


@dataclass(frozen=True)
class TrainingState:
    """A checkpoint on disk.

    Attributes:
        progress: of the training.
        parts: file and users of each worker, in the order of the ranks.
    """

    progress: Progress
    parts: tuple[tuple[Path, UserRanges], ...]

    def read_shared(self, group: str) -> TensorDict:
        """Return the shared tensors of a group (``model``, ``best`` or a moment) by name."""
        return _read(self.parts[0][0], group, local=False)

    def read_owned(self, group: str, users: UserRanges) -> TensorDict:
        """Return the tensors of a group that have a row for each of these users."""
        for path, owners in self.parts:
            if owners == users:
                return _read(path, group, local=True)
        return self._assemble(group, users)

    def _assemble(self, group: str, users: UserRanges) -> TensorDict:
        tensors: TensorDict = {}
        for path, owners in self.parts:
            with safetensors.safe_open(path, "pt") as file:
                for name in _list_names(file, group, local=True):
                    rows = file.get_slice(f"{group}.{name}")
                    if not rows.get_shape():  # the optimizer's count of steps
                        tensors[name] = file.get_tensor(f"{group}.{name}")
                        continue
                    if name not in tensors:
                        tensors[name] = rows[:0].new_zeros(users.num_users, *rows.get_shape()[1:])
                    for target, source, count in find_overlaps(users, owners):
                        tensors[name][target : target + count] = rows[source : source + count]
        return tensors


def find_overlaps(users: UserRanges, owners: UserRanges) -> list[tuple[int, int, int]]:
    """Return (first local index in ``users``, first local index in ``owners``, length) of each range that both have."""
    runs, target = [], 0
    for first, count in users.slices:
        source = 0
        for other, size in owners.slices:
            start, end = max(first, other), min(first + count, other + size)
            if start < end:
                runs.append((target + start - first, source + start - other, end - start))
            source += size
        target += count
    return runs


def save_state(
    folder: Path,
    key: str,
    model: nn.Module,
    optimizers: Optimizers,
    best: TensorDict,
    progress: Progress,
    users: UserRanges,
) -> None:
    """Write the state atomically. All workers call this together.

    Args:
        folder: visible to all workers.
        key: hash of everything that the training depends on; a state with another key is not resumed.
        model, optimizers: current weights and moments.
        best: state dict of the model at its best epoch.
        progress: of the training.
        users: users that this worker owns.
    """
    rank = get_rank()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()} | optimizers.get_moments()
    saved = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
        if rank == 0 or is_local(name.partition(".")[2])
    }
    path = folder / f"epoch-{progress.epoch:05d}-{rank:05d}-of-{get_world_size():05d}.safetensors"
    with open_atomic(path, "wb") as file:
        file.write(safetensors.torch.save(saved))
    parts: list[Any] = [(path.name, users.slices)]
    if get_world_size() > 1:
        parts = [None] * get_world_size()
        dist.all_gather_object(parts, (path.name, users.slices))  # once this returns, every file is written
    if rank == 0:
        write_json(folder / RECORD, {"key": key, "progress": asdict(progress), "parts": parts})
        for old in set(folder.glob("epoch-*.safetensors")) - {folder / name for name, _ in parts}:
            old.unlink()
    if get_world_size() > 1:
        dist.barrier()  # from here on, all workers read this record


def read_state(folder: Path, key: str) -> TrainingState | None:
    """Return the state in a folder; None if there is none, or it has another key.

    Raises:
        CheckpointError: the record or a file is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["key"] != key:
            return None
        parts = [(folder / name, UserRanges(tuple((a, b) for a, b in slices))) for name, slices in record["parts"]]
        for part, _ in parts:
            with safetensors.safe_open(part, "pt"):
                pass
        return TrainingState(Progress(**record["progress"]), tuple(parts))
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete it and start the step again") from error


def restore_state(state: TrainingState, model: nn.Module, optimizers: Optimizers, users: UserRanges) -> TensorDict:
    """Load a state into model and optimizers and return the best weights.

    Args:
        state: see ``read_state``.
        model: with a row for each of the users.
        optimizers: of the model.
        users: users that this worker owns, whichever worker wrote them.
    """

    def read(group: str) -> TensorDict:
        return state.read_shared(group) | state.read_owned(group, users)

    model.load_state_dict(read("model"))
    moments = {
        f"{moment}.{name}": tensor
        for moment in ("step", "exp_avg", "exp_avg_sq")
        for name, tensor in read(moment).items()
    }
    optimizers.set_moments(moments)
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in read("best").items()}


def _read(path: Path, group: str, *, local: bool) -> TensorDict:
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(f"{group}.{name}") for name in _list_names(file, group, local=local)}


def _list_names(file: Any, group: str, *, local: bool) -> list[str]:
    prefix = f"{group}."
    names = [name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
    return [name for name in names if is_local(name) is local]
