"""``cf.feedback: all``: scores use as-of counts of user and item, and nothing else changes."""

import numpy as np
import pytest
import torch

from collm_dist.cf.model_files import load_cf_model
from collm_dist.cf.user_shards import load_worker_data
from collm_dist.data.samples.pair_features import PAIR_FEATURES, compute_count_features
from collm_dist.data.shards.interactions import load_interactions
from collm_dist.data.shards.manifest import load_manifest
from tests.unit.cf_data import MODELS, fit_and_export, make_cf
from tests.unit.evaluation_run import write_data_step

COUNTS = ("user_likes", "user_rows", "item_likes", "item_rows")


def test_counts_are_those_of_the_rows(tmp_path):
    run_dir = write_data_step(tmp_path)
    data_dir = run_dir.step_dir("data")
    rows = load_worker_data(data_dir, load_manifest(data_dir), with_counts=True).splits["test"]
    table = load_interactions(data_dir, [*COUNTS, "user_idx", "timestamp", "row_id"], "test")
    order = np.lexsort((table["row_id"], table["timestamp"], table["user_idx"]))
    expected = np.stack([table[name][order] for name in COUNTS], axis=1)
    assert np.array_equal(rows.counts.numpy(), expected)
    batch, numbers = rows.take(torch.arange(rows.num_contexts), 3)
    assert np.array_equal(batch.features.numpy(), compute_count_features(*expected[numbers].T))
    assert batch.features.shape == (rows.total_rows, len(PAIR_FEATURES))


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_learned_come_back_and_leave_the_vectors_alone(tmp_path, name):
    run_dir = write_data_step(tmp_path)
    fit_and_export(run_dir, make_cf(name, feedback="all"), tmp_path / "states")
    model = load_cf_model(run_dir, load_manifest(run_dir.step_dir("data")))
    assert model.final.wide.weight.abs().max() > 0.01
    users, items = torch.arange(6), torch.arange(6)
    history, features = torch.full((6, 2), -1), torch.randn(6, len(PAIR_FEATURES))
    added = model.score(users, history, items, features) - model.score(users, history, items)
    assert torch.allclose(added, features @ model.final.wide.weight[0], atol=1e-5)
    time = torch.zeros(6)
    vectors = model.user_vectors(users, history, items, time), model.item_vectors(items, time)
    torch.nn.init.normal_(model.final.wide.weight)
    again = model.user_vectors(users, history, items, time), model.item_vectors(items, time)
    assert all(torch.equal(before, after) for before, after in zip(vectors, again, strict=True))


def test_with_feedback_likes_counts_are_not_read(tmp_path):
    run_dir = write_data_step(tmp_path)
    fit_and_export(run_dir, make_cf("mf"), tmp_path / "states")
    model = load_cf_model(run_dir, load_manifest(run_dir.step_dir("data")))
    assert model.final.wide is None
    users, history = torch.arange(6), torch.full((6, 2), -1)
    features = torch.randn(6, len(PAIR_FEATURES))
    assert torch.equal(model.score(users, history, users, features), model.score(users, history, users))
