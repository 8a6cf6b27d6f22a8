"""CF models as files: safetensors, with the model's class and the id tables that its rows belong to in the header."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from collm_dist.artifacts import RunDir, compute_json_hash, open_atomic
from collm_dist.cf.mf import MatrixFactorization
from collm_dist.data.id_tables import compute_ids_hash
from collm_dist.data.interactions import load_item_table, load_user_ids
from collm_dist.data.manifest import Manifest
from collm_dist.errors import ArtifactError

# By the name that is cf.model. Each is built from (user_rows, item_rows, **arguments).
MODEL_CLASSES: dict[str, type[Any]] = {MatrixFactorization.name: MatrixFactorization}
FILE_NAME = "model.safetensors"


def save_cf_model(path: Path, model: Any, manifest: Manifest) -> str:
    """Write a trained model, whole or not at all.

    Args:
        path: where to.
        model: a TrainableCfModel; its vectors are unit-scaled from now on.
        manifest: of the data that the tables' indices belong to.

    Returns:
        SHA-256 of header and tensors; not of the file, in which safetensors orders the header's keys by chance.
    """
    model.fix_scales()
    metadata = {
        "model": model.name,
        "arguments": json.dumps(model.arguments, sort_keys=True),
        "users_hash": manifest.users_hash,
        "items_hash": manifest.items_hash,
        "num_users": str(manifest.num_users),
        "num_items": str(manifest.num_items),
    }
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with open_atomic(path, "wb") as file:
        file.write(safetensors.torch.save(tensors, metadata))
    digest = hashlib.sha256(compute_json_hash(metadata).encode())
    for key in sorted(tensors):
        digest.update(f"{key} {tuple(tensors[key].shape)} {tensors[key].dtype}".encode())
        digest.update(tensors[key].numpy().tobytes())
    return digest.hexdigest()


def load_cf_model(run_dir: RunDir, manifest: Manifest) -> Any:
    """Load the CF model of a run, on the CPU, frozen, in evaluation mode.

    Tables that have grown since (``dataset.extend_from``) are accepted: what is new is unknown to the model.

    Returns:
        A CfModel that is also a torch module.

    Raises:
        ArtifactError: missing, damaged, or made for other id tables; the message names both hashes.
    """
    path = run_dir.step_dir("cf") / FILE_NAME
    if not path.exists():
        raise ArtifactError(f"{path} is missing: run launch/pretrain_cf.py first")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        model_class = MODEL_CLASSES[metadata["model"]]
        sizes = [int(metadata[name]) for name in ("num_users", "num_items")]
        model: Any = model_class(*(torch.zeros(size, dtype=torch.int64) for size in sizes),
                                 **json.loads(metadata["arguments"]))  # fmt: skip
        model.load_state_dict(tensors)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): redo the step with --force cf") from error
    _check_tables(path, metadata, run_dir.step_dir("data"), manifest)
    return model.eval().requires_grad_(False)


def _check_tables(path: Path, metadata: dict[str, str], data_dir: Path, manifest: Manifest) -> None:
    """Refuse a model whose rows are not those of the first users and items of today's tables."""
    for kind, expected, count in (
        ("users", manifest.users_hash, manifest.num_users),
        ("items", manifest.items_hash, manifest.num_items),
    ):
        found, size = metadata[f"{kind}_hash"], int(metadata[f"num_{kind}"])
        if found == expected:
            continue
        if size < count:  # the tables may have grown
            ids = load_user_ids(data_dir) if kind == "users" else load_item_table(data_dir)["item_id"]
            if compute_ids_hash(ids[:size]) == found:
                continue
        raise ArtifactError(
            f"{path} was trained on another table of {kind}: {size} with hash {found}, the data of this run have "
            f"{count} with hash {expected}; redo the step with --force cf"
        )
