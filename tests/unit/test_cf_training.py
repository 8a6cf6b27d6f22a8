"""Training of the CF models: initial biases, resume, early stopping, errors."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from collm_dist.cf.biases import fit_biases
from collm_dist.cf.cross_fit import compute_fold_starts
from collm_dist.cf.jobs import Job
from collm_dist.cf.optimizer import RowAdam
from collm_dist.cf.sharded_checkpoint import find_overlaps, read_state
from collm_dist.cf.trainer import check_metric, compute_metrics, sample_contexts, train_cf
from collm_dist.cf.user_shards import UserRanges
from collm_dist.cf.worker import LogTarget, run_single_worker
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import CheckpointError, ConfigError, DataError
from collm_dist.monitoring import EPOCH_SECONDS, read_metrics
from tests.unit.cf_data import MODELS, build, load_workers, make_cf, make_plan
from tests.unit.evaluation_run import write_data_step


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_data_step(tmp_path_factory.mktemp("data"))


def run(run_dir, folder, cf, *, seed=0, plan=None, on_epoch=lambda *_: None, spread=0.0):
    model, data = build(run_dir, cf, seed=seed, spread=spread)
    fit_biases(model, data.splits["train"], cf.bias_weight_decay)
    progress = train_cf(
        model,
        data.splits["train"],
        data.splits["valid"],
        data.users,
        plan or make_plan(cf, seed),
        checkpoints=folder,
        key="key",
        on_epoch=on_epoch,
    )
    return model, data, progress


def read_best(folder, users):
    state = read_state(folder, "key")
    return state.read_shared("best") | state.read_owned("best", users)


def test_training_starts_at_the_bias_logistic(run_dir):
    """Twelve rounds of coordinate-wise Newton steps end within 0.01 of the optimum with the same intercept."""
    model, data = build(run_dir, make_cf("mf"), spread=0.0)
    rows = data.splits["train"]
    fit_biases(model, rows, 2.0)
    users, items = rows.row_users.long().numpy(), model.items.resolve(rows.item_idx.long()).numpy()
    features = np.zeros((len(users), len(model.users.weight) + len(model.items.weight)))
    features[np.arange(len(users)), users] = 1
    features[np.arange(len(users)), len(model.users.weight) + items] = 1
    base = model.global_bias.item()
    labels = rows.label.numpy()
    ours = np.concatenate([model.users.weight[:, -1].detach(), model.items.weight[:, -1].detach()])
    theirs = fit_with_offset(features, labels, base, 2.0)
    assert np.abs(ours - theirs).max() < 0.01
    free = LogisticRegression(C=0.5, tol=1e-10, max_iter=1000).fit(features, labels)
    assert np.corrcoef(features @ ours, features @ free.coef_[0])[0, 1] > 0.99


def fit_with_offset(features, labels, base, decay):
    """Return the optimum by Newton's method on all coordinates jointly."""
    weights = np.zeros(features.shape[1])
    for _ in range(30):
        chance = 1 / (1 + np.exp(-(base + features @ weights)))
        gradient = features.T @ (labels - chance) - decay * weights
        hessian = features.T @ (features * (chance * (1 - chance))[:, None]) + decay * np.eye(len(weights))
        weights += np.linalg.solve(hessian, gradient)
    return weights


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", MODELS)
def test_every_seed_leaves_chance_level(run_dir, tmp_path, name, seed):
    _, _, progress = run(run_dir, tmp_path, make_cf(name), seed=seed)
    assert progress.best_metrics["valid_auc"] > 0.65


@pytest.fixture(scope="module")
def tastes(tmp_path_factory):
    """Build data in which labels depend only on the pair, so biases stay at chance level."""
    return write_data_step(tmp_path_factory.mktemp("tastes"), taste=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", MODELS)
def test_every_seed_learns_vectors_if_biases_carry_no_information(tastes, tmp_path, name, seed):
    """Measured on valid: mf .99, lightgcn .81 to .90, sasrec and din .98 and above; biases alone .49."""
    model, data = build(tastes, make_cf(name), seed=seed, spread=0.0)
    with torch.no_grad():
        for table in (model.users, model.items):
            table.weight[:, :-1] = 0
    fit_biases(model, data.splits["train"], 1.0)
    model.refresh()
    assert compute_metrics(model, data.splits["valid"])["auc"] < 0.6
    cf = make_cf(name, weight_decay=0.3, num_epochs=10 if name == "sasrec" else 20, early_stop_patience=20)
    assert run(tastes, tmp_path, cf, seed=seed)[2].best_metrics["valid_auc"] > 0.7


def test_row_adam_equals_sparse_adam():
    """Byte for byte, as checkpoints of either resume with the other."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(9, 5, generator=generator)
    ours, theirs = torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.clone())
    optimizers = RowAdam([ours], 0.1), torch.optim.SparseAdam([theirs], 0.1)
    for _ in range(5):
        rows = torch.randint(0, 9, (1, 6), generator=generator)
        gradient = torch.sparse_coo_tensor(rows, torch.randn(6, 5, generator=generator), (9, 5))
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours, theirs)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizers[0].state[ours][moment], optimizers[1].state[theirs][moment])


@pytest.mark.parametrize("name", MODELS)
def test_interrupted_training_ends_with_the_same_weights(run_dir, tmp_path, name):
    cf = make_cf(name, dropout=0.3)
    _, data, whole = run(run_dir, tmp_path / "whole", cf)
    seen = []

    def interrupt(epoch, _):
        seen.append(epoch)
        if len(seen) in (1, 5):  # before the first checkpoint, and after it
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(run_dir, tmp_path / "broken", cf, on_epoch=interrupt)
    _, _, broken = run(run_dir, tmp_path / "broken", cf, on_epoch=interrupt)
    assert seen == [1, 1, 2, 3, 4, 5, 6]
    assert whole == broken
    first, second = read_best(tmp_path / "whole", data.users), read_best(tmp_path / "broken", data.users)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_best_weights_are_those_of_the_best_epoch(run_dir, tmp_path):
    cf = make_cf("mf", learning_rate=0.1, num_epochs=100, early_stop_patience=5, weight_decay=0.0)
    model, data, progress = run(run_dir, tmp_path, cf)
    assert progress.epoch == progress.best_epoch + 5 < 100
    assert compute_metrics(model, data.splits["valid"])["auc"] < progress.best_metrics["valid_auc"]
    model.load_state_dict(read_best(tmp_path, data.users))
    assert compute_metrics(model, data.splits["valid"])["auc"] == progress.best_metrics["valid_auc"]


@pytest.mark.parametrize(("max_contexts", "step"), [(1000, 1), (20, 4), (9, 7)])
@pytest.mark.parametrize("num_slices", [1, 2])
def test_any_number_of_workers_scores_the_same_sample(num_slices, max_contexts, step, tmp_path):
    """Seven workers share four buckets, so some have no rows."""
    run_dir = write_data_step(tmp_path, num_slices=num_slices)
    found = {}
    for world_size in (1, 2, 3, 7):
        found[world_size] = []
        for owned, part in load_workers(run_dir, world_size, "valid"):
            users = owned.to_dense()
            for context in sample_contexts(part, max_contexts).tolist():
                targets = slice(*part.context_offsets[context : context + 2].tolist())
                user = users[part.user_idx[context]].item()
                found[world_size].append((user, part.timestamp[targets].tolist(), part.item_idx[targets].tolist()))
    assert len(found[1]) == -(-part.total_contexts // step) <= max_contexts
    assert all(sorted(sample) == found[1] for sample in found.values())


def test_an_epoch_penalizes_each_row_once(run_dir):
    model, data = build(run_dir, make_cf("mf", unknown_item_share=0.0))
    rows = data.splits["train"]
    batch, _ = rows.take(torch.arange(rows.num_contexts), 0)
    squares = [table.weight[table.known, :-1].square().sum() for table in (model.users, model.items)]
    biases = [table.weight[table.known, -1].square().sum() for table in (model.users, model.items)]
    expected = 3.0 * sum(squares) / 2 + 0.5 * sum(biases) / 2
    assert model.penalty(batch, 3.0, 0.5).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_unknown_item_is_learned(run_dir, tmp_path):
    model, _, _ = run(run_dir, tmp_path, make_cf("mf", unknown_item_share=0.2))
    assert model.items.known[-1]
    assert model.items.weight[-1].abs().min() > 0
    none, _, _ = run(run_dir, tmp_path / "none", make_cf("mf", unknown_item_share=0.0))
    assert torch.equal(none.items.weight[-1], torch.zeros(7))


@pytest.mark.parametrize("name", [*MODELS, "tests.examples.own_cf_model:RecentLikes"])
def test_padding_is_not_an_unknown_item(run_dir, name):
    """SparseAdam updates every row in a sparse gradient, even with zero; the padding depends on the workers."""
    settings = {"arguments": {"half_life": 5.0}} if ":" in name else {}
    model, data = build(run_dir, make_cf(name, **settings))
    rows = data.splits["train"]
    batch, _ = rows.take(torch.arange(40), model.history_length)
    assert (batch.history < 0).any()
    model.train()
    model(batch).sum().backward()
    assert model.items.known[-1]
    gradient = model.items.weight.grad
    updated = gradient.coalesce().indices()[0] if gradient.is_sparse else gradient.abs().sum(1).nonzero()
    assert len(updated)
    assert model.items.unknown not in updated


def test_state_with_another_key_is_not_resumed_and_a_damaged_one_is_reported(run_dir, tmp_path):
    run(run_dir, tmp_path, make_cf("mf", num_epochs=2))
    assert read_state(tmp_path, "other") is None
    path = next(tmp_path.glob("epoch-*.safetensors"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        read_state(tmp_path, "key")


def test_overlaps_of_user_ranges():
    users, owners = UserRanges(((0, 4), (10, 5))), UserRanges(((2, 6), (12, 10)))
    assert find_overlaps(users, owners) == [(2, 0, 2), (6, 6, 3)]


def test_an_undefined_selection_metric_is_refused():
    users, likes = np.array([0, 1]), np.ones(2)
    with pytest.raises(DataError, match="auc needs likes and dislikes"):
        check_metric(likes, users, "auc")
    with pytest.raises(DataError, match="uauc needs a user"):
        check_metric(np.array([0.0, 1.0]), users, "uauc")
    check_metric(likes, users, "logloss")


def test_a_loss_that_is_not_finite_stops(run_dir, tmp_path):
    cf = make_cf("mf")
    with pytest.raises(ConfigError, match=r"cf\.learning_rate"):
        run(run_dir, tmp_path, cf, plan=replace(make_plan(cf), learning_rate=1e30))


def test_the_first_epoch_does_not_include_loading_and_folds(run_dir, tmp_path):
    data_dir = run_dir.step_dir("data")
    starts = compute_fold_starts(data_dir, load_manifest(data_dir), 2)
    cf = make_cf("mf", num_epochs=2, fold_epochs=40, cross_fit=2)
    job = Job(data_dir, tmp_path / "checkpoints", "key", cf, 0, starts)
    seen, started = [], time.perf_counter()
    run_single_worker(job, LogTarget(tmp_path / "log", tensorboard=False), lambda _, metrics: seen.append(set(metrics)))
    total = time.perf_counter() - started
    lines = read_metrics(tmp_path / "log" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert 0 < sum(line[EPOCH_SECONDS] for line in lines) < total / 2
    assert all("seconds" not in line for line in lines)
    assert seen == [{"train_loss", "valid_auc", "valid_uauc", "valid_logloss"}] * 2
