"""Export of trained CF models: vectors aligned between folds and unit-scaled, one model file per fold.

Tables are written part by part through a memory map, so no table has to fit into memory.

Shapes: S sampled training rows, H history items.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_dist.cf.batches import Rows, take_before
from collm_dist.cf.fitting import resolve_arguments
from collm_dist.cf.jobs import Job
from collm_dist.cf.model_files import FILE_NAME, ModelHeader, load_model, name_fold_file
from collm_dist.cf.models import TrainableCfModel
from collm_dist.cf.safetensors_writer import create_tensor_file
from collm_dist.cf.sharded_checkpoint import TrainingState
from collm_dist.cf.user_shards import UserRanges, load_worker_data
from collm_dist.data.shards.manifest import Manifest
from collm_dist.errors import ArtifactError, LaunchError
from collm_dist.runs.atomic_files import compute_json_hash
from collm_dist.runs.code_trust import read_model_name

# (S,) users, (S, H) histories and (S,) targets, as ``user_vectors`` takes them.
VectorQueries = tuple[Tensor, Tensor, Tensor]
_HASH_ROWS = 1 << 16


def export_models(job: Job, folder: Path, manifest: Manifest) -> str:
    """Write the model files of a finished job and return the hash of all of them.

    Each fold's vectors are rotated onto those of the fold before, the first ones onto the run that this one extends.

    Args:
        job: a job whose models are trained.
        folder: gets the files; earlier ones are removed.
        manifest: of the data.

    Raises:
        LaunchError: a training state is missing.
    """
    for old in folder.glob("*.safetensors"):
        old.unlink()
    data = load_worker_data(job.data_dir, manifest)
    hashes: list[str] = []
    previous = _load_predecessor(job)
    for fold, name in enumerate(job.list_models(), start=1):
        state = job.read_state(name)
        if state is None:
            raise LaunchError(f"{job.checkpoints / name} was not written: do all nodes share {folder}?")
        is_final = name == "final"
        train = data.splits["train"] if is_final else take_before(data.splits["train"], job.fold_starts[fold - 1])
        arguments = resolve_arguments(job.cf, manifest, job.seed)
        header = ModelHeader.from_manifest(
            manifest, job.cf.model, arguments, job.fold_starts if is_final else (), job.cf.feedback
        )
        users, history, target = sample_queries(data.users, train, arguments["history_length"])
        if job.fold_starts:
            users = torch.full_like(users, -1)  # with folds, slots read users as unknown
        path = folder / (FILE_NAME if is_final else name_fold_file(fold))
        sample = users, history, target
        hashes.append(write_model(path, state, header, with_users=is_final, previous=previous, sample=sample))
        previous = load_model(path)[1] if job.fold_starts else None
    return compute_json_hash(hashes)


def _load_predecessor(job: Job) -> TrainableCfModel | None:
    """Return the model of the run that this one extends, None if its vectors have another width."""
    if job.previous is None:
        return None
    if ":" in (name := read_model_name(job.previous)) and name != job.cf.model:
        raise ArtifactError(
            f"{job.previous}: its header names code, model: {name}, and cf.model is {job.cf.model}; set "
            "dataset.extend_from to a run that you trust, or cf.warm_start to false"
        )
    model = load_model(job.previous)[1]
    return model if model.dim == job.cf.embedding_dim else None


def sample_queries(users: UserRanges, rows: Rows, history_length: int, max_contexts: int = 10_000) -> VectorQueries:
    """Return the queries of evenly spaced contexts, each with its first target."""
    count = min(max_contexts, rows.num_contexts)
    contexts = torch.arange(count) * rows.num_contexts // max(count, 1)
    batch, _ = rows.take(contexts, history_length)
    first_targets = torch.searchsorted(batch.target_contexts, torch.arange(len(contexts)))
    return users.to_dense()[batch.user_idx], batch.history, batch.item_idx[first_targets]


def write_model(
    path: Path,
    state: TrainingState,
    header: ModelHeader,
    *,
    with_users: bool,
    previous: TrainableCfModel | None,
    sample: VectorQueries,
) -> str:
    """Write the best weights of a training state as a model file, atomically.

    Args:
        path: of the file.
        state: of the training.
        header: goes into the file.
        with_users: whether the file holds the users' rows; a model that reads only histories needs none.
        previous: model of the fold before, or of an earlier run, onto whose items this one is rotated.
        sample: queries of training rows, whose vectors define the unit of length.

    Returns:
        SHA-256 of header and tensors.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        maps = _write_tensors(temporary, state, header, with_users)
        model = load_model(temporary)[1]
        factors = compute_export_factors(model, previous, sample)
        for name, value in factors.items():
            maps[name][...] = value.numpy()
        for array in maps.values():
            if isinstance(array, np.memmap):
                array.flush()
        digest = _hash_tensors(maps, header)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _write_tensors(path: Path, state: TrainingState, header: ModelHeader, with_users: bool) -> dict[str, NDArray[Any]]:
    shared = state.read_shared("best")
    first_owned = state.read_owned("best", state.parts[0][1])
    num_users = header.num_users if with_users else 0
    shapes = {name: (str(tensor.numpy().dtype), tuple(tensor.shape)) for name, tensor in shared.items()}
    shapes |= {
        name: (str(tensor.numpy().dtype), (num_users, *tensor.shape[1:])) for name, tensor in first_owned.items()
    }
    maps = create_tensor_file(path, shapes, header.to_metadata())
    for name, tensor in shared.items():
        maps[name][...] = tensor.numpy()
    if with_users:
        for _, users in state.parts:
            for name, tensor in state.read_owned("best", users).items():
                done = 0
                for start, count in users.slices:
                    maps[name][start : start + count] = tensor[done : done + count].numpy()
                    done += count
    return maps


@torch.no_grad()
def compute_export_factors(
    model: TrainableCfModel, previous: TrainableCfModel | None, sample: VectorQueries
) -> dict[str, Tensor]:
    """Return the buffers that turn a model's own vectors into exported ones: rotation and scales.

    The rotation is the orthogonal one that brings the known items closest to those of ``previous`` (Schoenemann, "A
    generalized solution of the orthogonal Procrustes problem", 1966).

    Args:
        model: a model whose rotation and scales still are the identity.
        previous: see ``write_model``.
        sample: see ``write_model``.
    """
    known = model.items.known[:-1].nonzero().squeeze(1)
    ours = model.item_vectors(known)
    rotation = torch.eye(model.dim)
    if previous is not None:
        num_both = min(len(model.items.known), len(previous.items.known)) - 1  # an earlier run has fewer items
        common = (model.items.known[:num_both] & previous.items.known[:num_both]).nonzero().squeeze(1)
        theirs = previous.item_vectors(common) / previous.item_scale
        left, _, right = torch.linalg.svd(model.item_vectors(common)[:, :-1].T @ theirs[:, :-1])
        rotation = left @ right
    users = model.user_vectors(*sample)
    return {
        "rotation": rotation,
        "item_scale": _compute_scale(ours),
        "user_scale": _compute_scale(users),
    }


def _compute_scale(vectors: Tensor) -> Tensor:
    """Return one over the root mean square norm of the non-zero rows; 1 if all rows are zero."""
    squares = vectors.square().sum(dim=1)
    nonzero = squares[squares > 0]
    return nonzero.mean().rsqrt() if len(nonzero) else torch.ones(())


def _hash_tensors(tensors: Mapping[str, NDArray[Any]], header: ModelHeader) -> str:
    digest = hashlib.sha256(compute_json_hash(header.to_metadata()).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        for rows in _iter_rows(tensor):
            digest.update(rows.tobytes())
    return digest.hexdigest()


def _iter_rows(tensor: NDArray[Any]) -> Iterator[NDArray[Any]]:
    if tensor.ndim == 0:
        yield tensor
        return
    for first in range(0, len(tensor), _HASH_ROWS):
        yield tensor[first : first + _HASH_ROWS]
