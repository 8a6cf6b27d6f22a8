"""The training state of a CF model: one file a worker, and a record that names them, written last.

A worker's file holds the rows of the users that it owns, with Adam's moments; the first worker's holds what all share,
too. A state can be read by any number of workers: rows are looked up by whose they are.
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
    """How far training is.

    Attributes:
        epoch: passes done; the first is 1.
        best_epoch: the pass after which the weights were best, 0 = none yet.
        best_metrics: metrics then.
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
        progress: how far training was.
        parts: each worker's file and users, the first worker's first.
    """

    progress: Progress
    parts: tuple[tuple[Path, UserRanges], ...]

    def read_shared(self, group: str) -> TensorDict:
        """Return the tensors of a group (model, best, or a moment) that all workers share, by their own names."""
        return _read(self.parts[0][0], group, local=False)

    def read_owned(self, group: str, users: UserRanges) -> TensorDict:
        """Return the group's tensors with a row for each of these users."""
        for path, owners in self.parts:
            if owners == users:
                return _read(path, group, local=True)
        return self._assemble(group, users)

    def _assemble(self, group: str, users: UserRanges) -> TensorDict:
        found: TensorDict = {}
        for path, owners in self.parts:
            with safetensors.safe_open(path, "pt") as file:
                for name in _list_names(file, group, local=True):
                    rows = file.get_slice(f"{group}.{name}")
                    if not rows.get_shape():  # the optimizer's count of steps
                        found[name] = file.get_tensor(f"{group}.{name}")
                        continue
                    if name not in found:
                        found[name] = rows[:0].new_zeros(users.num_users, *rows.get_shape()[1:])
                    for target, source, count in find_overlaps(users, owners):
                        found[name][target : target + count] = rows[source : source + count]
        return found


def find_overlaps(wanted: UserRanges, owners: UserRanges) -> list[tuple[int, int, int]]:
    """Return (local number in ``wanted``, local number in ``owners``, users) of the runs that both have."""
    runs, target = [], 0
    for first, count in wanted.slices:
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
    """Write the state; a reader sees the one before or this one, never a part. All workers call this together.

    Args:
        folder: seen by all workers.
        key: names what the training depends on; a state of another key is not continued.
        model, optimizers: as they are.
        best: the model's state dict at its best epoch.
        progress: how far training is.
        users: whom this worker owns.
    """
    rank = get_rank()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()} | optimizers.get_moments()
    mine = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
        if rank == 0 or is_local(name.partition(".")[2])
    }
    path = folder / f"epoch-{progress.epoch:05d}-{rank:05d}-of-{get_world_size():05d}.safetensors"
    with open_atomic(path, "wb") as file:
        file.write(safetensors.torch.save(mine))
    parts: list[Any] = [(path.name, users.slices)]
    if get_world_size() > 1:
        parts = [None] * get_world_size()
        dist.all_gather_object(parts, (path.name, users.slices))  # every file is there once this returns
    if rank == 0:
        write_json(folder / RECORD, {"key": key, "progress": asdict(progress), "parts": parts})
        for old in set(folder.glob("epoch-*.safetensors")) - {folder / name for name, _ in parts}:
            old.unlink()
    if get_world_size() > 1:
        dist.barrier()  # whoever reads the record next finds this one


def read_state(folder: Path, key: str) -> TrainingState | None:
    """Read a state's record; None if there is none, or one that was made from something else.

    Raises:
        CheckpointError: record or files are damaged.
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
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete it and start the step again") from error


def restore_state(state: TrainingState, model: nn.Module, optimizers: Optimizers, users: UserRanges) -> TensorDict:
    """Put a state back into model and optimizers and return the best weights.

    Args:
        state: as of read_state.
        model: whose users are these.
        optimizers: of the model.
        users: whom this worker owns, whoever wrote them.
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
