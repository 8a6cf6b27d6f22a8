"""CF models as files: what comes back, and what is refused."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import torch

from collm_dist.artifacts import RunDir
from collm_dist.cf.export import load_cf_model, save_cf_model
from collm_dist.cf.mf import MatrixFactorization
from collm_dist.data.id_tables import compute_ids_hash
from collm_dist.data.manifest import Manifest
from collm_dist.errors import ArtifactError

USERS, ITEMS = [f"user {n}" for n in range(5)], [f"item {n}" for n in range(4)]


def make_manifest(users=USERS, items=ITEMS):
    return Manifest(
        num_users=len(users),
        num_items=len(items),
        users_hash=compute_ids_hash(users),
        items_hash=compute_ids_hash(items),
        ties="strict",
        feedback="explicit",
        max_history_length=5,
        splits={},
        shards=(),
        buckets=(),
        dropped={},
        content_hash="",
    )


def write_tables(run_dir, users, items):
    data_dir = run_dir.step_dir("data")
    data_dir.mkdir(exist_ok=True)
    pq.write_table(pa.table({"user_idx": range(len(users)), "user_id": users}), data_dir / "users.parquet")
    pq.write_table(pa.table({"item_idx": range(len(items)), "item_id": items}), data_dir / "items.parquet")


@pytest.fixture
def saved(tmp_path):
    run_dir = RunDir(tmp_path)
    model = MatrixFactorization(
        torch.tensor([3, 2, 1, 4, 0]), torch.tensor([1, 2, 3, 4]), embedding_dim=6, init_scale=0.5, seed=1
    )
    torch.nn.init.normal_(model.item_bias)
    save_cf_model(run_dir.step_dir("cf") / "model.safetensors", model, make_manifest())
    return run_dir, model


def test_a_model_comes_back_as_it_was(saved):
    run_dir, model = saved
    loaded = load_cf_model(run_dir, make_manifest())
    users, items = torch.tensor([0, 3, 4, -1]), torch.tensor([2, 0, 3, -1])
    history = torch.full((4, 2), -1)
    assert torch.equal(loaded.score(users, history, items), model.score(users, history, items))
    assert torch.equal(loaded.user_vectors(users, history, items), model.user_vectors(users, history, items))
    assert torch.equal(loaded.item_vectors(items), model.item_vectors(items))
    norms = loaded.item_vectors(torch.arange(4)).square().sum(1)
    assert norms.mean().item() == pytest.approx(1.0, rel=1e-5)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert (loaded.embedding_dim, loaded.depends_on_target, loaded.name) == (6, False, "mf")


def test_the_header_names_class_and_tables(saved):
    run_dir, _ = saved
    with safetensors.safe_open(run_dir.step_dir("cf") / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "mf"
    assert metadata["users_hash"] == compute_ids_hash(USERS)
    assert metadata["num_items"] == "4"


def test_the_content_hash_is_of_tensors_and_tables(saved, tmp_path):
    _, model = saved
    first = save_cf_model(tmp_path / "a", model, make_manifest())
    assert {save_cf_model(tmp_path / "b", model, make_manifest()) for _ in range(5)} == {first}
    assert save_cf_model(tmp_path / "b", model, make_manifest(users=[*USERS[:-1], "other"])) != first
    with torch.no_grad():
        model.item_bias[0] += 1
    assert save_cf_model(tmp_path / "b", model, make_manifest()) != first


@pytest.mark.parametrize("kind", ["users", "items"])
def test_another_table_is_refused_with_both_hashes(saved, kind):
    run_dir, _ = saved
    other = replace(make_manifest(), **{f"{kind}_hash": "f" * 64})
    own = getattr(make_manifest(), f"{kind}_hash")
    with pytest.raises(ArtifactError, match=f"another table of {kind}.*{own}.*{'f' * 64}.*--force cf"):
        load_cf_model(run_dir, other)


def test_a_grown_table_is_accepted_and_what_is_new_is_unknown(saved):
    run_dir, _ = saved
    users, items = [*USERS, "new"], [*ITEMS, "newer"]
    write_tables(run_dir, users, items)
    loaded = load_cf_model(run_dir, make_manifest(users, items))
    assert torch.equal(loaded.item_vectors(torch.tensor([4])), torch.zeros(1, 6))
    assert loaded.score(torch.tensor([5]), torch.zeros(1, 0), torch.tensor([4])) == loaded.global_bias


def test_a_larger_table_of_other_ids_is_refused(saved):
    run_dir, _ = saved
    users = ["someone", *USERS]
    write_tables(run_dir, users, ITEMS)
    with pytest.raises(ArtifactError, match="another table of users"):
        load_cf_model(run_dir, make_manifest(users))


def test_missing_and_damaged_files_are_named(saved):
    run_dir, _ = saved
    path = run_dir.step_dir("cf") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged.*--force cf"):
        load_cf_model(run_dir, make_manifest())
    path.unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors is missing: run launch/pretrain_cf\.py"):
        load_cf_model(run_dir, make_manifest())
