"""Model files: round trip, memory, id-table checks."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import torch

from collm_dist.cf.fitting import build_untrained
from collm_dist.cf.model_export import write_model
from collm_dist.cf.model_files import ModelHeader, load_cf_model
from collm_dist.cf.safetensors_writer import create_tensor_file
from collm_dist.cf.sharded_checkpoint import read_state
from collm_dist.data.ingest.id_tables import compute_ids_hash
from collm_dist.data.shards.manifest import compute_content_hash, load_manifest
from collm_dist.errors import ArtifactError
from tests.unit.cf_data import MODELS, fit_and_export, load_data, make_cf
from tests.unit.evaluation_run import NUM_ITEMS, NUM_USERS, write_data_step

USERS, ITEMS = [f"user {n}" for n in range(NUM_USERS)], [f"item {n}" for n in range(NUM_ITEMS)]


def write_tables(run_dir, users, items):
    data_dir = run_dir.step_dir("data")
    pq.write_table(pa.table({"user_idx": range(len(users)), "user_id": users}), data_dir / "users.parquet")
    pq.write_table(pa.table({"item_idx": range(len(items)), "item_id": items}), data_dir / "items.parquet")


def name_tables(manifest, users=USERS, items=ITEMS):
    """Return the manifest with the hashes of these id tables."""
    return replace(
        manifest,
        num_users=len(users),
        num_items=len(items),
        users_hash=compute_ids_hash(users),
        items_hash=compute_ids_hash(items),
    )


@pytest.fixture
def saved(tmp_path):
    """Return a run with a trained MF whose header names USERS and ITEMS."""
    run_dir = write_data_step(tmp_path)
    record = json.loads(run_dir.record_path("data").read_text())
    record |= {"users_hash": compute_ids_hash(USERS), "items_hash": compute_ids_hash(ITEMS)}
    record["content_hash"] = compute_content_hash(record)
    run_dir.record_path("data").write_text(json.dumps(record))
    fit_and_export(run_dir, make_cf("mf"), tmp_path / "states")
    return run_dir, load_manifest(run_dir.step_dir("data"))


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name):
    run_dir, cf = write_data_step(tmp_path), make_cf(name)
    fit_and_export(run_dir, cf, tmp_path / "states")
    manifest, data = load_data(run_dir)
    state = read_state(tmp_path / "states" / "final", "key")
    model = build_untrained(cf, manifest, data.users, data.splits["train"], 0)
    model.load_state_dict(state.read_shared("best") | state.read_owned("best", data.users))
    model.eval()
    loaded = load_cf_model(run_dir, manifest)
    users, items = torch.tensor([0, 3, NUM_USERS - 1, -1]), torch.tensor([2, 0, 3, -1])
    history = torch.tensor([[-1, 4], [1, 2], [0, 5], [-1, -1]])
    assert torch.equal(loaded.score(users, history, items), model.score(users, history, items))
    rows = data.splits["train"]
    batch, _ = rows.take(torch.arange(rows.num_contexts), 8)
    known = loaded.item_vectors(torch.arange(NUM_ITEMS - 3), torch.zeros(NUM_ITEMS - 3))
    assert known.square().sum(1).mean().item() == pytest.approx(1.0, rel=1e-4)
    firsts = torch.searchsorted(batch.target_contexts, torch.arange(rows.num_contexts))
    vectors = loaded.user_vectors(batch.user_idx, batch.history, batch.item_idx[firsts], torch.zeros(rows.num_contexts))
    assert vectors.square().sum(1).mean().item() == pytest.approx(1.0, rel=1e-4)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.embedding_dim == cf.embedding_dim + 1
    assert loaded.depends_on_target is (name == "din")


def test_exported_vectors_still_match(saved):
    """Exported vectors reproduce the score: unscaled inner product plus both biases."""
    run_dir, manifest = saved
    loaded = load_cf_model(run_dir, manifest)
    users, items = torch.arange(10), torch.arange(10)
    history, time = torch.full((10, 1), -1), torch.zeros(10)
    p = loaded.user_vectors(users, history, items, time) / loaded.final.user_scale
    q = loaded.item_vectors(items, time) / loaded.final.item_scale
    unknown = loaded.final.items.weight[-1]
    expected = (p[:, :-1] * (q[:, :-1] + unknown[:-1])).sum(1) + p[:, -1] + q[:, -1] + unknown[-1]
    scores = loaded.score(users, history, items)
    assert (expected + loaded.final.global_bias - scores).abs().max() < 1e-5


def test_the_header_names_class_and_tables(saved):
    run_dir, _ = saved
    with safetensors.safe_open(run_dir.step_dir("cf") / "model.safetensors", "pt") as file:
        header = ModelHeader.from_metadata(file.metadata())
    assert header.model == "mf"
    assert header.users_hash == compute_ids_hash(USERS)
    assert header.num_items == NUM_ITEMS
    assert header.arguments["embedding_dim"] == 6


def test_the_content_hash_is_of_tensors_and_tables(saved, tmp_path):
    run_dir, manifest = saved
    state = read_state(tmp_path / "states" / "final", "key")
    sample = (torch.arange(5), torch.full((5, 1), -1), torch.arange(5))

    def write(manifest):
        header = ModelHeader.from_manifest(
            manifest, "mf", {"embedding_dim": 6, "history_length": 8, "prior_precision": 1.0}
        )
        return write_model(tmp_path / "copy", state, header, with_users=True, previous=None, sample=sample)

    first = write(manifest)
    assert write(manifest) == first
    assert write(name_tables(manifest, users=[*USERS[:-1], "other"])) != first
    again = fit_and_export(run_dir, make_cf("mf"), tmp_path / "again")
    assert again == fit_and_export(run_dir, make_cf("mf"), tmp_path / "third")
    assert again != fit_and_export(run_dir, make_cf("mf", num_epochs=1), tmp_path / "fourth")


@pytest.mark.parametrize("kind", ["users", "items"])
def test_another_table_is_refused_with_both_hashes(saved, kind):
    run_dir, manifest = saved
    other = replace(manifest, **{f"{kind}_hash": "f" * 64})
    actual_hash = getattr(manifest, f"{kind}_hash")
    with pytest.raises(ArtifactError, match=f"another table of {kind}.*{actual_hash}.*{'f' * 64}.*--force cf"):
        load_cf_model(run_dir, other)


def test_a_grown_table_is_accepted_and_new_ids_are_unknown(saved):
    run_dir, manifest = saved
    users, items = [*USERS, "new"], [*ITEMS, "newer"]
    write_tables(run_dir, users, items)
    loaded = load_cf_model(run_dir, name_tables(manifest, users, items))
    new = torch.tensor([NUM_ITEMS])
    assert torch.equal(loaded.item_vectors(new, torch.zeros(1)), torch.zeros(1, 7))
    unknown = loaded.score(torch.tensor([-1]), torch.zeros(1, 0), torch.tensor([-1]))
    assert loaded.score(torch.tensor([NUM_USERS]), torch.zeros(1, 0), new) == unknown


def test_a_larger_table_of_other_ids_is_refused(saved):
    run_dir, manifest = saved
    users = ["someone", *USERS]
    write_tables(run_dir, users, ITEMS)
    with pytest.raises(ArtifactError, match="another table of users"):
        load_cf_model(run_dir, name_tables(manifest, users))


def test_missing_and_damaged_files_are_named(saved):
    run_dir, manifest = saved
    path = run_dir.step_dir("cf") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged.*--force cf"):
        load_cf_model(run_dir, manifest)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors is missing: run launch/pretrain_cf\.py"):
        load_cf_model(run_dir, manifest)


LOOK_UP = """
import sys
from pathlib import Path
import torch
from collm_dist.cf.model_files import load_model

def read_private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

load_model(Path(sys.argv[2]))  # one-time allocations
before = read_private()
_, model = load_model(Path(sys.argv[1]))
users = torch.arange(0, 1_500_000, 1000)
model.user_vectors(users, torch.full((len(users), 1), -1), users)
print(read_private() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_lookup_does_not_load_the_table_into_memory(saved, tmp_path):
    """Looking up 1,500 users in a table of 42 MB takes less than 8 MB of private memory."""
    run_dir, _ = saved
    small, large = run_dir.step_dir("cf") / "model.safetensors", tmp_path / "large.safetensors"
    with safetensors.safe_open(small, "np") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rows = 1_500_000
    shapes = {
        name: (str(tensor.dtype), (rows, *tensor.shape[1:]) if name.startswith("users.") else tensor.shape)
        for name, tensor in tensors.items()
    }
    maps = create_tensor_file(large, shapes, header)
    for name, tensor in tensors.items():
        maps[name][...] = 1 if name.startswith("users.") else tensor
    assert sum(np.prod(shape, dtype=int) * np.dtype(kind).itemsize for kind, shape in shapes.values()) > 40e6
    command = [sys.executable, "-c", LOOK_UP, str(large), str(small)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(output) * 1024 < 8e6
