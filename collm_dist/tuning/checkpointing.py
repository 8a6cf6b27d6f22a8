"""Checkpoints: one safetensors file with the training state and its position, whatever ZeRO stage or process count.

A checkpoint is written under a temporary name, fsynced and renamed; the one before is removed only after that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from collm_dist.artifacts import find_changes, open_atomic
from collm_dist.errors import CheckpointError
from collm_dist.tuning.engine import TrainingState

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where training stands.

    Attributes:
        global_step: updates made.
        best_value, best_step: of the selection metric; None before the first validation.
        best_metrics: all validation metrics of the best step.
        bad_validations: validations since the best one.
        is_finished: nothing is left to train.
    """

    global_step: int = 0
    best_value: float | None = None
    best_step: int = 0
    best_metrics: dict[str, Any] = field(default_factory=dict)
    bad_validations: int = 0
    is_finished: bool = False


def save_checkpoint(path: Path, state: TrainingState, progress: Progress, fingerprint: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: the file.
        state, progress: what to go on from.
        fingerprint: of the stage; resuming under another one is refused.
    """
    tensors = {f"weight.{name}": value for name, value in state.weights.items()}
    tensors |= {f"moment.{name}": value for name, value in state.moments.items()}
    header = {
        "adam_steps": str(state.adam_steps),
        "progress": json.dumps(asdict(progress)),
        "fingerprint": json.dumps(dict(fingerprint), sort_keys=True),
    }
    with open_atomic(path, "wb") as file:
        file.write(safetensors.torch.save(tensors, header))


def load_checkpoint(path: Path, fingerprint: Mapping[str, Any]) -> tuple[TrainingState, Progress]:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is damaged, or belongs to other data or settings.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        progress = Progress(**json.loads(header["progress"]))
        recorded = json.loads(header["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: the checkpoint is damaged ({error}); delete it to start the stage anew"
        ) from None
    changes = find_changes(recorded, fingerprint)
    if changes:
        raise CheckpointError(
            f"{path} was made with something else:\n  " + "\n  ".join(changes) + "\nStart anew with --force, or set "
            "run.dir to a new directory."
        )
    state = TrainingState(
        weights={name.removeprefix("weight."): one for name, one in tensors.items() if name.startswith("weight.")},
        moments={name.removeprefix("moment."): one for name, one in tensors.items() if name.startswith("moment.")},
        adam_steps=int(header["adam_steps"]),
    )
    return state, progress


def find_last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint to resume from, or None."""
    return max(folder.glob("step-*.safetensors"), default=None)


def save_last(folder: Path, state: TrainingState, progress: Progress, fingerprint: Mapping[str, Any]) -> None:
    """Write the checkpoint to resume from, then remove the ones before."""
    path = folder / f"step-{progress.global_step:09d}.safetensors"
    save_checkpoint(path, state, progress, fingerprint)
    for older in folder.glob("step-*.safetensors"):
        if older != path:
            older.unlink()


def save_best(folder: Path, state: TrainingState, progress: Progress, fingerprint: Mapping[str, Any]) -> None:
    """Write the weights of the best validation so far."""
    save_checkpoint(folder / "best.safetensors", TrainingState(state.weights), progress, fingerprint)
