"""Matrix factorization and its trainer: against closed forms, by any split of the work, from any checkpoint."""

import multiprocessing
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

from collm_dist.cf.base import CfModel
from collm_dist.cf.checkpoint import read_state, take_group
from collm_dist.cf.mf import BIAS_PENALTY, MatrixFactorization
from collm_dist.cf.trainer import (
    Rows,
    TrainingPlan,
    check_metric,
    compute_metrics,
    find_owned_rows,
    iter_batches,
    train_cf,
)
from collm_dist.errors import CheckpointError, ConfigError, DataError

NUM_USERS, NUM_ITEMS = 40, 30
PLAN = TrainingPlan(
    learning_rate=1e-2,
    weight_decay=2.0,
    global_batch_size=100,
    num_epochs=15,
    select_metric="auc",
    early_stop_patience=15,
    checkpoint_every_epochs=4,
    seed=3,
)


def make_rows(count, seed):
    """Likes of users and items that differ; the last two users and items never occur."""
    random, tastes = np.random.default_rng(seed), np.random.default_rng(0)
    mood, quality = tastes.normal(size=NUM_USERS), tastes.normal(size=NUM_ITEMS)
    user = np.sort(random.integers(0, NUM_USERS - 2, count))
    item = random.integers(0, NUM_ITEMS - 2, count)
    label = (mood[user] + quality[item] + random.normal(size=count) > 0).astype(np.int8)
    return Rows.from_arrays(user, item, label)


def make_model(train, seed=0, dim=4):
    user_rows = torch.bincount(train.user_idx, minlength=NUM_USERS)
    item_rows = torch.bincount(train.item_idx, minlength=NUM_ITEMS)
    return MatrixFactorization(user_rows, item_rows, embedding_dim=dim, init_scale=0.1, seed=seed)


def no_history(index):
    return torch.zeros(len(index), 0, dtype=torch.int64)


def test_score_and_gradients_equal_the_closed_form():
    rows = make_rows(50, seed=1)
    model = make_model(rows).double()
    with torch.no_grad():
        model.user_bias.normal_()
        model.item_bias.normal_()
        model.global_bias.fill_(0.3)
    users, items, labels = rows.user_idx, rows.item_idx, rows.label.double()
    logits = model.score(users, no_history(users), items)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    (loss + 2.0 * model.compute_penalty(users, items)).backward()

    p, q = model.user_table.detach(), model.item_table.detach()
    expected = 0.3 + model.user_bias[users, 0] + model.item_bias[items, 0] + (p[users] * q[items]).sum(1)
    assert torch.allclose(logits, expected, atol=1e-12)
    residual = (torch.sigmoid(expected) - labels).detach()
    met = torch.bincount(users, minlength=NUM_USERS) > 0
    gradient = torch.zeros_like(p).index_add_(0, users, residual[:, None] * q[items]) + 2.0 * p * met[:, None]
    bias = torch.zeros(NUM_USERS, dtype=torch.float64).index_add_(0, users, residual)
    bias += 2.0 * BIAS_PENALTY * model.user_bias[:, 0].detach() * met
    assert torch.allclose(model.user_table.grad, gradient, atol=1e-6)  # shares are float32
    assert torch.allclose(model.user_bias.grad[:, 0], bias, atol=1e-6)
    assert torch.allclose(model.global_bias.grad, residual.sum(), atol=1e-12)


def test_a_pass_penalizes_every_known_row_once():
    rows = make_rows(200, seed=1)
    model = make_model(rows)
    total = model.compute_penalty(rows.user_idx, rows.item_idx)
    assert total.item() == pytest.approx(
        (model.user_table.square().sum() + model.item_table.square().sum()).item() / 2, rel=1e-5
    )


def test_unknown_users_and_items_stay_the_prior_mean(tmp_path):
    train = make_rows(300, seed=1)
    model = make_model(train)
    run(model, train, make_rows(100, seed=2), tmp_path)
    with torch.no_grad():
        model.global_bias.fill_(0.5)
    assert model.user_bias[:-2].abs().min() > 0
    unknown = torch.tensor([-1, NUM_USERS - 1, NUM_USERS, NUM_USERS + 1000])
    assert torch.equal(model.user_vectors(unknown, no_history(unknown), unknown), torch.zeros(4, 4))
    assert torch.equal(model.item_vectors(unknown), torch.zeros(4, 4))
    items = torch.full((4,), -1)
    assert torch.equal(model.score(unknown, no_history(unknown), items), torch.full((4,), 0.5))


def test_vectors_are_unit_scaled_and_scores_are_not():
    train = make_rows(300, seed=1)
    model = make_model(train)
    users, items = train.user_idx[:9], train.item_idx[:9]
    before = model.score(users, no_history(users), items)
    model.fix_scales()
    known = torch.arange(NUM_USERS - 2)
    norms = model.user_vectors(known, no_history(known), known).square().sum(1)
    assert norms[model.user_table[: NUM_USERS - 2].square().sum(1) > 0].mean().sqrt().item() == pytest.approx(1.0)
    assert torch.equal(model.score(users, no_history(users), items), before)
    assert isinstance(model, CfModel)


def test_batches_are_a_permutation_of_seed_and_epoch():
    batches = list(iter_batches(250, 100, seed=1, epoch=2))
    assert [len(batch) for batch in batches] == [100, 100, 50]
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(250))
    assert torch.equal(batches[0], next(iter_batches(250, 100, seed=1, epoch=2)))
    assert not torch.equal(batches[0], next(iter_batches(250, 100, seed=1, epoch=3)))
    assert not torch.equal(batches[0], next(iter_batches(250, 100, seed=2, epoch=2)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 100])
def test_every_user_has_one_owner(world_size):
    users = make_rows(300, seed=1).user_idx
    owned = [find_owned_rows(users, rank, world_size) for rank in range(world_size)]
    assert owned[0][0] == 0
    assert owned[-1][1] == 300
    for (_, last), (first, _) in pairwise(owned):
        assert last == first
        assert first in (0, 300) or users[first] != users[first - 1]


@pytest.mark.parametrize("seed", range(5))
def test_every_seed_leaves_chance_level(tmp_path, seed):
    train, valid = make_rows(2000, seed=1), make_rows(500, seed=2)
    model = make_model(train, seed=seed, dim=16)
    progress = run(model, train, valid, tmp_path, replace(PLAN, seed=seed))
    assert progress.best_metrics["valid_auc"] > 0.75


def run(model, train, valid, folder, plan=PLAN, on_epoch=lambda *_: None):
    return train_cf(
        model, train, valid, plan, checkpoint_path=folder / "last.safetensors", key="key", on_epoch=on_epoch
    )


def load_best(folder):
    tensors, progress = read_state(folder / "last.safetensors", "key")
    return take_group(tensors, "best"), progress


def test_interrupted_training_ends_where_an_undisturbed_one_does(tmp_path):
    train, valid = make_rows(600, seed=1), make_rows(200, seed=2)
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    run(make_model(train), train, valid, tmp_path / "whole")
    seen = []

    def interrupt(epoch, metrics):
        seen.append(epoch)
        if len(seen) in (3, 9, 11):  # before the first checkpoint, and after it
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(make_model(train), train, valid, tmp_path / "broken", on_epoch=interrupt)
    run(make_model(train), train, valid, tmp_path / "broken", on_epoch=interrupt)
    assert seen != sorted(set(seen))
    whole, broken = load_best(tmp_path / "whole"), load_best(tmp_path / "broken")
    assert whole[1] == broken[1]
    assert all(torch.equal(whole[0][name], broken[0][name]) for name in whole[0])


def test_best_weights_are_those_of_the_best_epoch(tmp_path):
    train, valid = make_rows(600, seed=1), make_rows(200, seed=2)
    model = make_model(train, dim=16)
    plan = replace(PLAN, learning_rate=0.1, num_epochs=100, early_stop_patience=5, weight_decay=0.0)
    progress = run(model, train, valid, tmp_path, plan)
    assert progress.epoch == progress.best_epoch + 5 < 100
    model.load_state_dict(load_best(tmp_path)[0])
    metrics = compute_metrics(model, valid)
    assert metrics["auc"] == progress.best_metrics["valid_auc"]


def test_state_of_another_run_is_not_continued_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "last.safetensors"
    train, valid = make_rows(300, seed=1), make_rows(100, seed=2)
    run(make_model(train), train, valid, tmp_path, replace(PLAN, num_epochs=2))
    assert read_state(path, "other") is None
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"last\.safetensors"):
        read_state(path, "key")


def test_what_cannot_be_selected_by_is_refused():
    likes = Rows(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.ones(2))
    with pytest.raises(DataError, match="auc needs likes and dislikes"):
        check_metric(likes, "auc")
    with pytest.raises(DataError, match="uauc needs a user"):
        check_metric(replace(likes, label=torch.tensor([0.0, 1.0])), "uauc")
    check_metric(likes, "logloss")


def test_a_loss_that_is_not_finite_stops(tmp_path):
    train, valid = make_rows(300, seed=1), make_rows(100, seed=2)
    with pytest.raises(ConfigError, match=r"cf\.learning_rate"):
        run(make_model(train), train, valid, tmp_path, replace(PLAN, learning_rate=1e30))


def _train_as_worker(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    train, valid = make_rows(600, seed=1), make_rows(200, seed=2)
    run(make_model(train), train, valid, folder, replace(PLAN, global_batch_size=37))
    dist.destroy_process_group()


def test_two_workers_make_the_steps_of_one(tmp_path):
    """Batches of 37 rows of 38 users: shares are uneven, and some are empty. Tolerance: rounding under Adam."""
    train, valid = make_rows(600, seed=1), make_rows(200, seed=2)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run(make_model(train), train, valid, tmp_path / "one", replace(PLAN, global_batch_size=37))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_train_as_worker, args=(rank, 2, tmp_path / "two")) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    one, two = load_best(tmp_path / "one"), load_best(tmp_path / "two")
    assert one[1].best_epoch == two[1].best_epoch
    differences = [(one[0][name] - two[0][name]).abs().max().item() for name in one[0]]
    assert max(differences) < 5e-5, differences
