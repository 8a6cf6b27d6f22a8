"""Model files of the CF step: safetensors whose header names the model's class and id tables.

Tables are read through a memory map, so no table has to fit into memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from collm_dist.cf.models.interface import TrainableCfModel, is_local
from collm_dist.cf.models.registry import get_model_class
from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.data.ingest.id_tables import compute_ids_hash
from collm_dist.data.shards.interactions import load_item_table, load_user_ids
from collm_dist.data.shards.manifest import Manifest
from collm_dist.errors import ArtifactError
from collm_dist.runs.damage import name_damage
from collm_dist.runs.file_hashes import check_files
from collm_dist.runs.run_dir import RunDir

FILE_NAME = "model.safetensors"


@dataclass(frozen=True)
class ModelHeader:
    """Header of a model file.

    Attributes:
        model: ``cf.model``.
        arguments: constructor arguments of the class.
        users_hash, items_hash, num_users, num_items: of the id tables.
        fold_starts: timestamps (seconds) at which folds 1, 2, ... begin; empty without cross-fitting.
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
        """Build a header with the id tables of the data."""
        tables = manifest.users_hash, manifest.items_hash, manifest.num_users, manifest.num_items
        return cls(model, arguments, *tables, tuple(fold_starts), feedback)

    def to_metadata(self) -> dict[str, str]:
        """Return the header as safetensors metadata: JSON strings by name."""
        return {name: json.dumps(value, sort_keys=True) for name, value in vars(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ModelHeader:
        """Parse the result of ``to_metadata``."""
        values = {name: json.loads(metadata[name]) for name in cls.__dataclass_fields__}
        return cls(**values | {"fold_starts": tuple(values["fold_starts"])})


def name_fold_file(number: int) -> str:
    """Return the file name of the model that serves a fold (1 or more); the last fold's is ``FILE_NAME``."""
    return f"fold-{number:02d}.safetensors"


def load_model(path: Path) -> tuple[ModelHeader, TrainableCfModel]:
    """Load a model file on the CPU, frozen, in evaluation mode; its tables stay memory-mapped.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    if not path.exists():
        raise ArtifactError(f"{path} is missing: run launch/pretrain_cf.py first")
    with name_damage(path, "restore it from a copy, or redo the step with --force cf"):
        with safetensors.safe_open(path, "pt") as file:
            header = ModelHeader.from_metadata(file.metadata())
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        model = get_model_class(header.model)(0, header.num_items, **header.arguments)
        if header.feedback == "all":
            model.add_wide()
        if (text := tensors.get("items.text.vectors")) is not None:
            model.items.add_text(text[:-1])
        model.users.assign({name.removeprefix("users."): tensor for name, tensor in tensors.items() if is_local(name)})
        shared = {name: tensor for name, tensor in tensors.items() if not is_local(name)}
        missing, unexpected = model.load_state_dict(shared, strict=False, assign=True)
        if wrong := [*unexpected, *(name for name in missing if not is_local(name))]:
            raise KeyError(", ".join(wrong))
    return header, model.eval().requires_grad_(False)


def load_cf_model(run_dir: RunDir, manifest: Manifest) -> SlotVectors:
    """Load the CF models of a run: one, or with cross-fitting one for each fold after the first.

    Id tables that have grown since (``dataset.extend_from``) are accepted; new users and items are unknown.

    Raises:
        ArtifactError: a file is missing, damaged, or belongs to other id tables; the message names both hashes.
    """
    folder = run_dir.step_dir("cf")
    check_files(run_dir, "cf")
    header, final = load_model(folder / FILE_NAME)
    _check_tables(folder / FILE_NAME, header, run_dir.step_dir("data"), manifest)
    folds = [load_model(folder / name_fold_file(number))[1] for number in range(1, len(header.fold_starts))]
    return SlotVectors([*folds, final], header.fold_starts).eval()


def _check_tables(path: Path, header: ModelHeader, data_dir: Path, manifest: Manifest) -> None:
    """Raise ArtifactError unless the model's id tables are prefixes of today's."""
    for kind, expected, count in (
        ("users", manifest.users_hash, manifest.num_users),
        ("items", manifest.items_hash, manifest.num_items),
    ):
        trained_hash, size = getattr(header, f"{kind}_hash"), int(getattr(header, f"num_{kind}"))
        # Deleted users are renamed in today's table; the manifest records the hash from before.
        if trained_hash == expected or (trained_hash, size) == (
            manifest.extends.get(f"{kind}_hash"),
            manifest.extends.get(f"num_{kind}"),
        ):
            continue
        if size < count:  # the tables may have grown
            ids = load_user_ids(data_dir) if kind == "users" else load_item_table(data_dir)["item_id"]
            if compute_ids_hash(ids[:size]) == trained_hash:
                continue
        raise ArtifactError(
            f"{path} was trained on another table of {kind}: {size} with hash {trained_hash}; the data of this run "
            f"have {count} with hash {expected}; redo the step with --force cf"
        )
