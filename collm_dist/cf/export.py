"""Writing and reading a collaborative model: safetensors with the hashes of the id tables that it belongs to."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch

from collm_dist.artifacts import RunDir, open_atomic
from collm_dist.cf.mf import MatrixFactorization
from collm_dist.data.manifest import Manifest
from collm_dist.errors import ArtifactError


def save_cf_model(path: Path, model: MatrixFactorization, manifest: Manifest) -> None:
    """Write a model's tables, whole or not at all."""
    header = {
        "model": "mf",
        "users_hash": manifest.users_hash,
        "items_hash": manifest.items_hash,
        "num_users": str(manifest.num_users),
        "num_items": str(manifest.num_items),
        "embedding_dim": str(model.embedding_dim),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with open_atomic(path, "wb") as file:
        file.write(safetensors.torch.save(tensors, header))


def load_cf_model(run_dir: RunDir, manifest: Manifest) -> MatrixFactorization:
    """Load a run's model, frozen.

    Raises:
        ArtifactError: it is missing, damaged, or was made for other id tables.
    """
    path = run_dir.step_dir("cf") / "model.safetensors"
    if not path.exists():
        raise ArtifactError(f"{path} is missing: run launch/pretrain_cf.py first")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): run the step 'cf' again with --force cf") from error
    for name in ("users_hash", "items_hash"):
        if header.get(name) != getattr(manifest, name):
            raise ArtifactError(
                f"{path} belongs to another id table: its {name} is {header.get(name, 'absent')}, that of "
                f"{run_dir.step_dir('data')} is {getattr(manifest, name)}. Run the step 'cf' for this data."
            )
    model = MatrixFactorization(manifest.num_users, manifest.num_items, int(header["embedding_dim"]))
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)
