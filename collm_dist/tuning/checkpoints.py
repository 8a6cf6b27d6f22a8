"""Checkpoints of a tuning stage: atomic safetensors files, portable across ZeRO stages and world sizes.

A checkpoint is written under a temporary name, synced to disk and renamed. The two newest are kept; if the newest is
damaged, training resumes from the one before. A file holds the whole training state, including the weights of the best
validation, so resuming from either file leads to the same result.
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
from collm_dist.errors import CheckpointError, DamagedCheckpointError
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.runs.fingerprints import check_checkpoint_fingerprint
from collm_dist.runs.run_dir import CHECKPOINT_PATTERN
from collm_dist.tuning.engine import TrainingState

logger = logging.getLogger(__name__)

MAX_CHECKPOINTS = 2


@dataclass
class Progress:
    """Position of training.

    Attributes:
        global_step: global batches consumed.
        last_loss: loss of the last update.
        validated_step: step of the last validation. A run stopped between an update and its validation validates when
            it resumes.
        best_value, best_step: best value of the selection metric, and its step; None before the first validation.
        best_metrics: all validation metrics of the best step.
        bad_validations: validations since the best step.
        guard_start: guard metric at the first validation, negated if lower is better; None without a guard.
        guard_refusals: validations that the guard metric excluded.
        nonfinite_skips: steps skipped because the loss or a gradient was not finite.
        is_finished: whether training has ended.
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
    guard_start: float | None = None
    guard_refusals: int = 0


@dataclass
class Checkpoint:
    """Complete training state.

    Attributes:
        state: weights and optimizer state; None before training.
        best_weights: float32 weights of the best validation by parameter name; empty before the first validation.
        progress: position of training.
    """

    state: TrainingState | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, fingerprint: Mapping[str, Any]) -> Path:
    """Write a checkpoint atomically, then delete all but the two newest.

    Args:
        folder: the stage's checkpoint folder.
        checkpoint: the training state.
        fingerprint: the stage's fingerprint; resuming with another one is refused.

    Returns:
        The file.

    Raises:
        DiskError: the file cannot be written; earlier checkpoints are untouched.
    """
    state = checkpoint.state
    assert state is not None
    tensors = {f"weight.{name}": value for name, value in state.weights.items()}
    tensors |= {f"moment.{name}": value for name, value in state.moments.items()}
    tensors |= {f"best.{name}": value for name, value in checkpoint.best_weights.items()}
    header = {
        "adam_steps": str(state.adam_steps),
        "progress": json.dumps(_to_record(checkpoint.progress)),
        "fingerprint": json.dumps(dict(fingerprint), sort_keys=True),
    }
    data = safetensors.torch.save(tensors, header | {"checksum": _compute_checksum(tensors, header)})
    path = folder / f"step-{checkpoint.progress.global_step:09d}.safetensors"
    with open_atomic(path, "wb", size_bytes=len(data)) as file:
        file.write(data)
    for older in sorted(folder.glob(CHECKPOINT_PATTERN))[:-MAX_CHECKPOINTS]:
        older.unlink()
    return path


def load_checkpoint(path: Path, fingerprint: Mapping[str, Any]) -> Checkpoint:
    """Load a checkpoint.

    Raises:
        DamagedCheckpointError: the file is incomplete or its checksum does not match.
        CheckpointError: it belongs to other data or settings.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if header.pop("checksum") != _compute_checksum(tensors, header):
            raise ValueError("the checksum does not match")
        progress = Progress(**json.loads(header["progress"]))
        recorded = json.loads(header["fingerprint"])
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError
    ) as error:  # fmt: skip
        raise DamagedCheckpointError(f"{path}: the checkpoint is damaged ({error})") from None
    check_checkpoint_fingerprint(path, recorded, fingerprint)

    def select(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    state = TrainingState(select("weight."), select("moment."), int(header["adam_steps"]))
    return Checkpoint(state, select("best."), progress)


def load_last_checkpoint(folder: Path, fingerprint: Mapping[str, Any]) -> Checkpoint:
    """Load the newest intact checkpoint; without any file, return an empty one. Collective.

    Rank 0 selects the file, and renames damaged ones.

    Raises:
        CheckpointError: all files are damaged, or the newest intact one belongs to other data or settings.
    """
    path = run_on_rank_0(lambda: _find_newest(folder, fingerprint))
    return load_checkpoint(path, fingerprint) if path else Checkpoint()


def _to_record(progress: Progress) -> dict[str, Any]:
    """Return the fields of a progress; without a guard those of release 0.1."""
    record = asdict(progress)
    if progress.guard_start is None:
        del record["guard_start"], record["guard_refusals"]
    return record


def _find_newest(folder: Path, fingerprint: Mapping[str, Any]) -> Path | None:
    for unfinished in folder.glob(f".{CHECKPOINT_PATTERN}.*.tmp"):  # left by a killed process
        unfinished.unlink()
    damaged = []
    for path in sorted(folder.glob(CHECKPOINT_PATTERN), reverse=True):
        try:
            load_checkpoint(path, fingerprint)
        except DamagedCheckpointError as error:
            damaged.append(path)
            logger.warning("%s; falling back to the one before", error)
            continue
        for damaged_path in damaged:
            damaged_path.rename(damaged_path.with_suffix(".damaged"))
        return path
    if damaged:
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged ({', '.join(path.name for path in damaged)}); delete them to "
            "restart the stage"
        )
    return None


def _compute_checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Return the SHA-256 of names, dtypes, shapes, values and header strings."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
