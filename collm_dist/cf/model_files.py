"""CF models as files: safetensors, with the model's class and the id tables that its rows belong to in the header.

Tables are written part by part and read through a memory map, so neither takes the whole table into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_dist.cf.models.interface import TrainableCfModel, is_local
from collm_dist.cf.models.registry import get_model_class
from collm_dist.cf.safetensors_writer import create_tensor_file
from collm_dist.cf.sharded_checkpoint import State
from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.cf.user_shards import UserRanges
from collm_dist.data.ingest.id_tables import compute_ids_hash
from collm_dist.data.shards.interactions import load_item_table, load_user_ids
from collm_dist.data.shards.manifest import Manifest
from collm_dist.errors import ArtifactError
from collm_dist.runs.atomic_files import compute_json_hash
from collm_dist.runs.run_dir import RunDir

FILE_NAME = "model.safetensors"
_HASH_ROWS = 1 << 16


@dataclass(frozen=True)
class ModelHeader:
    """What a file says of its model.

    Attributes:
        model: ``cf.model``.
        arguments: that the class is built with.
        users_hash, items_hash, num_users, num_items: of the id tables; a model without user rows has none of them.
        fold_starts: timestamps (seconds) from which the folds after the first one begin; none without cross-fitting.
        feedback: ``cf.feedback``.
    """

    model: str
    arguments: Mapping[str, Any]
    users_hash: str
    items_hash: str
    num_users: int
    num_items: int
    fold_starts: tuple[int, ...] = ()
    feedback: str = "likes"

    @classmethod
    def from_manifest(
        cls,
        manifest: Manifest,
        model: str,
        arguments: Mapping[str, Any],
        fold_starts: Sequence[int] = (),
        feedback: str = "likes",
    ) -> ModelHeader:
        """Take the id tables of the data."""
        tables = manifest.users_hash, manifest.items_hash, manifest.num_users, manifest.num_items
        return cls(model, arguments, *tables, tuple(fold_starts), feedback)

    def to_metadata(self) -> dict[str, str]:
        """Return it as safetensors metadata: text by text."""
        return {name: json.dumps(value, sort_keys=True) for name, value in vars(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ModelHeader:
        """Read what ``to_metadata`` made."""
        values = {name: json.loads(metadata[name]) for name in cls.__dataclass_fields__}
        return cls(**values | {"fold_starts": tuple(values["fold_starts"])})


def name_fold_file(number: int) -> str:
    """Return the file of the model that serves fold ``number``, 1 or more; the last fold's is ``FILE_NAME``."""
    return f"fold-{number:02d}.safetensors"


def write_model(
    path: Path, state: State, header: ModelHeader, *, with_users: bool, previous: TrainableCfModel | None, sample: Any
) -> str:
    """Write the best weights of a training state as a model file, whole or not at all.

    Args:
        path: where to.
        state: of the training.
        header: goes into the file.
        with_users: whether the users' rows go along; a model that reads histories alone needs none.
        previous: model of the fold before, or of an earlier run, onto whose items this one is rotated.
        sample: (user_idx, history, target) of training rows, whose vectors define the unit of length.

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
        for one in maps.values():
            if isinstance(one, np.memmap):
                one.flush()
        digest = _hash_tensors(maps, header)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _write_tensors(path: Path, state: State, header: ModelHeader, with_users: bool) -> dict[str, NDArray[Any]]:
    shared = state.read_shared("best")
    first = state.read_owned("best", state.parts[0][1])
    num_users = header.num_users if with_users else 0
    shapes = {name: (str(one.numpy().dtype), tuple(one.shape)) for name, one in shared.items()}
    shapes |= {name: (str(one.numpy().dtype), (num_users, *one.shape[1:])) for name, one in first.items()}
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
    model: TrainableCfModel, previous: TrainableCfModel | None, sample: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Tensor]:
    """Return the buffers that turn a model's own vectors into exported ones: rotation and scales.

    The rotation is the orthogonal one that brings the known items closest to the fold before (Schoenemann, "A
    generalized solution of the orthogonal Procrustes problem", 1966).

    Args:
        model: untouched by an earlier call.
        previous: see ``write_model``.
        sample: see ``write_model``.
    """
    known = model.items.known[:-1].nonzero().squeeze(1)
    ours = model.item_vectors(known)
    rotation = torch.eye(model.dim)
    if previous is not None:
        both = min(len(model.items.known), len(previous.items.known)) - 1  # an earlier run knew fewer items
        common = (model.items.known[:both] & previous.items.known[:both]).nonzero().squeeze(1)
        theirs = previous.item_vectors(common) / previous.item_scale
        left, _, right = torch.linalg.svd(model.item_vectors(common)[:, :-1].T @ theirs[:, :-1])
        rotation = left @ right
    users = model.user_vectors(*sample)
    return {
        "rotation": rotation,
        "item_scale": _invert_size(ours),
        "user_scale": _invert_size(users),
    }


def _invert_size(vectors: Tensor) -> Tensor:
    """Return one over the root mean square norm of the rows that are not zero; 1 where all are."""
    squares = vectors.square().sum(dim=1)
    known = squares[squares > 0]
    return known.mean().rsqrt() if len(known) else torch.ones(())


def _hash_tensors(tensors: Mapping[str, NDArray[Any]], header: ModelHeader) -> str:
    digest = hashlib.sha256(compute_json_hash(header.to_metadata()).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        for part in _iter_parts(tensor):
            digest.update(part.tobytes())
    return digest.hexdigest()


def _iter_parts(tensor: NDArray[Any]) -> Iterator[NDArray[Any]]:
    if tensor.ndim == 0:
        yield tensor
        return
    for first in range(0, len(tensor), _HASH_ROWS):
        yield tensor[first : first + _HASH_ROWS]


def load_model(path: Path) -> tuple[ModelHeader, TrainableCfModel]:
    """Load one model file, on the CPU, frozen, in evaluation mode; its tables stay in the memory map.

    Raises:
        ArtifactError: missing or damaged.
    """
    if not path.exists():
        raise ArtifactError(f"{path} is missing: run launch/pretrain_cf.py first")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = ModelHeader.from_metadata(file.metadata())
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        model = get_model_class(header.model)(0, header.num_items, **header.arguments)
        if header.feedback == "all":
            model.add_wide()
        model.users.adopt({name.removeprefix("users."): one for name, one in tensors.items() if is_local(name)})
        others = {name: one for name, one in tensors.items() if not is_local(name)}
        missing, unexpected = model.load_state_dict(others, strict=False, assign=True)
        if wrong := [*unexpected, *(name for name in missing if not is_local(name))]:
            raise KeyError(", ".join(wrong))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): redo the step with --force cf") from error
    return header, model.eval().requires_grad_(False)


def load_cf_model(run_dir: RunDir, manifest: Manifest) -> SlotVectors:
    """Load the CF models of a run: one, or with cross-fitting one for each fold after the first.

    Tables that have grown since (``dataset.extend_from``) are accepted: what is new is unknown to the model.

    Raises:
        ArtifactError: missing, damaged, or made for other id tables; the message names both hashes.
    """
    folder = run_dir.step_dir("cf")
    header, final = load_model(folder / FILE_NAME)
    _check_tables(folder / FILE_NAME, header, run_dir.step_dir("data"), manifest)
    folds = [load_model(folder / name_fold_file(number))[1] for number in range(1, len(header.fold_starts))]
    return SlotVectors([*folds, final], header.fold_starts).eval()


def _check_tables(path: Path, header: ModelHeader, data_dir: Path, manifest: Manifest) -> None:
    """Refuse a model whose rows are not those of the first users and items of today's tables."""
    for kind, expected, count in (
        ("users", manifest.users_hash, manifest.num_users),
        ("items", manifest.items_hash, manifest.num_items),
    ):
        found, size = getattr(header, f"{kind}_hash"), int(getattr(header, f"num_{kind}"))
        # Users who have been forgotten since have other names in today's table; who made it knew the one of then.
        if found == expected or (found, size) == (
            manifest.extends.get(f"{kind}_hash"),
            manifest.extends.get(f"num_{kind}"),
        ):
            continue
        if size < count:  # the tables may have grown
            ids = load_user_ids(data_dir) if kind == "users" else load_item_table(data_dir)["item_id"]
            if compute_ids_hash(ids[:size]) == found:
                continue
        raise ArtifactError(
            f"{path} was trained on another table of {kind}: {size} with hash {found}, the data of this run have "
            f"{count} with hash {expected}; redo the step with --force cf"
        )


def take_sample(users: UserRanges, rows: Any, length: int, count: int = 10_000) -> tuple[Tensor, Tensor, Tensor]:
    """Return (user_idx, history, target) of evenly spaced training rows, as ``user_vectors`` takes them."""
    count = min(count, rows.num_contexts)
    contexts = torch.arange(count) * rows.num_contexts // max(count, 1)
    batch, _ = rows.take(contexts, length)
    firsts = torch.searchsorted(batch.target_contexts, torch.arange(len(contexts)))
    return users.to_dense()[batch.user_idx], batch.history, batch.item_idx[firsts]
