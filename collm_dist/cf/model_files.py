"""CF models as files: safetensors, with the model's class and the id tables that its rows belong to in the header.

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
from collm_dist.runs.run_dir import RunDir

FILE_NAME = "model.safetensors"


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
