"""Checkpoints: one safetensors file with the training state and its position, whatever ZeRO stage or process count.

A checkpoint is written under a temporary name, brought to the disk and renamed. The two newest are kept: should the
newest be found damaged, training goes on from the one before. A file holds all that training has to remember, the
weights of the best validation too, so that whichever is taken leads to the same end.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from collm_dist.distributed import run_on_rank_0
from collm_dist.errors import CheckpointError
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.runs.fingerprints import find_changes
from collm_dist.tuning.engine import TrainingState

logger = logging.getLogger(__name__)

MAX_CHECKPOINTS = 2
_PATTERN = "step-*.safetensors"


@dataclass
class Progress:
    """Where training stands.

    Attributes:
        global_step: batches consumed.
        last_loss: of the last update.
        validated_step: of the last validation; a run that is stopped between an update and its validation makes it
            good when it goes on.
        best_value, best_step: of the selection metric; None before the first validation.
        best_metrics: all validation metrics of the best step.
        bad_validations: validations since the best one.
        nonfinite_skips: batches left out because their loss or a gradient was not finite.
        is_finished: nothing is left to train.
    """

    global_step: int = 0
    last_loss: float | None = None
    validated_step: int = 0
    best_value: float | None = None
    best_step: int = 0
    best_metrics: dict[str, Any] = field(default_factory=dict)
    bad_validations: int = 0
    nonfinite_skips: int = 0
    is_finished: bool = False


@dataclass
class Checkpoint:
    """All that training has to remember.

    Attributes:
        state: weights and optimizer; None before anything was trained.
        best_weights: float32 weights by parameter name at the best validation; empty before the first one.
        progress: where training stands.
    """

    state: TrainingState | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)


class DamagedCheckpointError(CheckpointError):
    """A file that is no whole checkpoint."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, fingerprint: Mapping[str, Any]) -> Path:
    """Write a checkpoint, whole or not at all, then remove all older ones but the one before.

    Args:
        folder: of the stage's checkpoints.
        checkpoint: what to go on from.
        fingerprint: of the stage; resuming under another one is refused.

    Returns:
        The file.

    Raises:
        DiskError: it cannot be written; the ones before are untouched.
    """
    state = checkpoint.state
    assert state is not None
    tensors = {f"weight.{name}": value for name, value in state.weights.items()}
    tensors |= {f"moment.{name}": value for name, value in state.moments.items()}
    tensors |= {f"best.{name}": value for name, value in checkpoint.best_weights.items()}
    header = {
        "adam_steps": str(state.adam_steps),
        "progress": json.dumps(asdict(checkpoint.progress)),
        "fingerprint": json.dumps(dict(fingerprint), sort_keys=True),
    }
    data = safetensors.torch.save(tensors, header | {"checksum": _compute_checksum(tensors, header)})
    path = folder / f"step-{checkpoint.progress.global_step:09d}.safetensors"
    with open_atomic(path, "wb", size_bytes=len(data)) as file:
        file.write(data)
    for older in sorted(folder.glob(_PATTERN))[:-MAX_CHECKPOINTS]:
        older.unlink()
    return path


def load_checkpoint(path: Path, fingerprint: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DamagedCheckpointError: it is not what was written.
        CheckpointError: it belongs to other data or settings.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if header.pop("checksum") != _compute_checksum(tensors, header):
            raise ValueError("its checksum is another one")
        progress = Progress(**json.loads(header["progress"]))
        recorded = json.loads(header["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise DamagedCheckpointError(f"{path}: the checkpoint is damaged ({error})") from None
    changes = find_changes(recorded, fingerprint)
    if changes:
        raise CheckpointError(
            f"{path} was made with something else:\n  " + "\n  ".join(changes) + "\nStart anew with --force, or set "
            "run.dir to a new directory."
        )

    def select(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    state = TrainingState(select("weight."), select("moment."), int(header["adam_steps"]))
    return Checkpoint(state, select("best."), progress)


def load_last_checkpoint(folder: Path, fingerprint: Mapping[str, Any]) -> Checkpoint:
    """Read the newest whole checkpoint; an empty one if there is none at all. Collective.

    The first process decides which one that is, and sets damaged ones aside under another name.

    Raises:
        CheckpointError: all are damaged, or the newest whole one belongs to other data or settings.
    """
    path = run_on_rank_0(lambda: _find_newest(folder, fingerprint))
    return load_checkpoint(path, fingerprint) if path else Checkpoint()


def _find_newest(folder: Path, fingerprint: Mapping[str, Any]) -> Path | None:
    for unfinished in folder.glob(f".{_PATTERN}.*.tmp"):  # a process was killed while it wrote them
        unfinished.unlink()
    damaged = []
    for path in sorted(folder.glob(_PATTERN), reverse=True):
        try:
            load_checkpoint(path, fingerprint)
        except DamagedCheckpointError as error:
            damaged.append(path)
            logger.warning("%s; going back to the one before", error)
            continue
        for damaged_path in damaged:
            damaged_path.rename(damaged_path.with_suffix(".damaged"))
        return path
    if damaged:
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged ({', '.join(path.name for path in damaged)}); remove them to start "
            "the stage anew"
        )
    return None


def _compute_checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Return the SHA-256 of all that a checkpoint says: names, types, shapes, numbers and the header's texts."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
