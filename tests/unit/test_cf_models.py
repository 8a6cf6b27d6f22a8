"""The four CF models: parity with plain references, and independence of padding and later rows."""

from functools import partial

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from collm_dist.cf.batches import CfBatch
from collm_dist.cf.models import CfModel, TrainableCfModel
from tests.reference import plain_cf
from tests.unit.cf_data import MODELS, build, make_cf
from tests.unit.evaluation_run import NUM_ITEMS, NUM_USERS, write_data_step


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_data_step(tmp_path_factory.mktemp("data"))


def pick_known(model, data, count=40):
    """Return (user, history, item) of training rows."""
    batch, _ = data.splits["train"].take(torch.arange(count), model.history_length)
    firsts = torch.searchsorted(batch.target_contexts, torch.arange(count))
    return batch.user_idx, batch.history, batch.item_idx[firsts]


@pytest.mark.parametrize("by_autograd", [False, True])
def test_mf_scores_and_gradients_equal_a_loop_over_rows(run_dir, by_autograd):
    """Penalty included; MF's own formulas, and the base class. Measured: gradients differ by up to 2e-7, float32."""
    model, data = build(run_dir, make_cf("mf"))
    users, history, items = pick_known(model, data)
    labels = (torch.arange(len(users)) % 3 == 0).float()
    model.train()
    batch = CfBatch.from_pairs(users, history[:, :0], items)
    backpropagate = partial(TrainableCfModel.backpropagate, model) if by_autograd else model.backpropagate
    loss = backpropagate(batch, labels, 1.0, 2.0, 0.5)
    logits = model(batch)

    rows = data.splits["train"]
    p, q = model.users.weight.detach().double(), model.items.weight.detach().double()
    expected = plain_cf.score_mf(model, users, items)
    assert (logits - expected).abs().max() < 1e-5
    assert loss.item() == pytest.approx(binary_cross_entropy_with_logits(expected, labels, reduction="sum").item())
    residual = torch.sigmoid(expected.detach().double()) - labels
    by_user, by_item = torch.zeros_like(p), torch.zeros_like(q)
    decay = torch.tensor([2.0] * 6 + [0.5])
    for row, (user, item) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        one = torch.ones(1)
        shares = 1 / (rows.row_users == user).sum(), 1 / (rows.item_idx == item).sum()
        by_user[user] += residual[row] * torch.cat([q[item, :-1], one]) + shares[0] * decay * p[user]
        by_item[item] += residual[row] * torch.cat([p[user, :-1], one]) + shares[1] * decay * q[item]
    assert (model.users.weight.grad.to_dense() - by_user).abs().max() < 1e-5
    assert (model.items.weight.grad.to_dense() - by_item).abs().max() < 1e-5
    assert abs(model.global_bias.grad.item() - residual.sum().item()) < 1e-5


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_lightgcn_equals_powers_of_the_dense_matrix(run_dir, num_layers):
    """Measured: up to 2e-7, float32."""
    model, data = build(run_dir, make_cf("lightgcn", num_layers=num_layers))
    rows = data.splits["train"]
    pairs = rows.row_users.long(), model.items.resolve(rows.item_idx.long())
    users, items = plain_cf.smooth_lightgcn(model, *pairs, num_layers)
    ours_users, ours_items, _ = model.propagate()
    assert (ours_users - users).abs().max() < 1e-5
    assert (ours_items - items).abs().max() < 1e-5
    queried, history, targets = pick_known(model, data)
    biases = model.users.weight[queried, -1] + model.items.weight[targets, -1] + model.global_bias
    expected = biases + (users[queried] * items[targets]).sum(1)
    assert (model.score(queried, history, targets) - expected).abs().max() < 1e-5


def test_lightgcn_gradients_equal_those_through_the_dense_matrix(run_dir):
    """Stored transpose against autograd. Measured: differences up to 3e-7 of 0.19, float32."""
    model, data = build(run_dir, make_cf("lightgcn", num_layers=3))
    rows = data.splits["train"]
    queried, _, targets = pick_known(model, data)
    labels = (torch.arange(len(queried)) % 3 == 0).float()
    model.train()
    logits = model(CfBatch.from_pairs(queried, queried.new_zeros(len(queried), 0), targets))
    weights = model.users.weight, model.items.weight
    gradients = torch.autograd.grad(binary_cross_entropy_with_logits(logits, labels, reduction="sum"), weights)

    users, items = plain_cf.smooth_lightgcn(
        model, rows.row_users.long(), model.items.resolve(rows.item_idx.long()), num_layers=3
    )
    biases = model.users.weight[queried, -1] + model.items.weight[targets, -1] + model.global_bias
    expected = biases + (users[queried] * items[targets]).sum(1)
    loss = binary_cross_entropy_with_logits(expected, labels.double(), reduction="sum")
    for gradient, expected_gradient in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
        assert (gradient - expected_gradient).abs().max() < 1e-5
        assert expected_gradient[:, :-1].abs().max() > 0.1


def test_lightgcn_folds_an_unknown_user_in_with_the_history_as_neighbors(run_dir):
    """Equal to the dense matrix with an additional user whose row is zero and who sends no messages."""
    model, data = build(run_dir, make_cf("lightgcn", num_layers=2))
    rows = data.splits["train"]
    users, items = rows.row_users.long(), model.items.resolve(rows.item_idx.long())
    liked = torch.unique(items)[:5]
    layers = [plain_cf.smooth_lightgcn(model, users, items, power)[1] * (power + 1) for power in range(2)]
    below = layers[1]  # E0 + E1: what layers 1 and 2 of the user are made of
    degrees = torch.zeros(NUM_ITEMS + 1).index_add_(0, *count_pairs(users, items)).clamp(min=1)
    expected = (below[liked] * degrees[liked, None].rsqrt()).sum(0) * len(liked) ** -0.5 / 3
    batch = CfBatch.from_pairs(torch.tensor([-1]), liked[None], torch.tensor([0]))
    assert (model.compute_user_vectors(batch)[0] - expected).abs().max() < 1e-5


def count_pairs(users, items):
    distinct = torch.unique(torch.stack([users, items]), dim=1)[1]
    return distinct, torch.ones(len(distinct))


def test_sasrec_equals_multihead_attention_with_a_mask(run_dir):
    """Measured: up to 1e-6, float32."""
    model, data = build(run_dir, make_cf("sasrec"))
    users, history, items = pick_known(model, data)
    scores = model.score(users, history, items)
    for row in range(len(users)):
        liked = model.items.resolve(history[row][history[row] >= 0])
        state = plain_cf.encode_sasrec(model, liked) if len(liked) else model.nobody
        item = model.items.weight[items[row]]
        expected = model.global_bias + model.users.weight[users[row], -1] + item[-1] + state @ item[:-1]
        assert abs(scores[row] - expected) < 1e-5


def test_din_equals_a_loop_over_the_history(run_dir):
    """Measured: up to 2e-6, float32."""
    model, data = build(run_dir, make_cf("din"))
    users, history, items = pick_known(model, data)
    scores = model.score(users, history, items)
    for row in range(len(users)):
        liked = model.items.resolve(history[row][history[row] >= 0])
        expected = plain_cf.score_din(model, model.users.weight[users[row], -1], liked, items[row])
        assert abs(scores[row] - expected) < 1e-5


def test_mf_folds_an_unknown_user_in_by_a_newton_step(run_dir):
    """Measured: up to 1e-6; the package solves a system in H unknowns, the reference in E."""
    model, _ = build(run_dir, make_cf("mf", weight_decay=3.0))
    liked = torch.tensor([1, 4, 2])
    batch = CfBatch.from_pairs(torch.tensor([NUM_USERS + 5]), torch.tensor([[-1, -1, 1, 4, 2]]), torch.tensor([0]))
    expected = plain_cf.fold_in_mf(model, model.items.resolve(liked), precision=3.0)
    assert (model.compute_user_vectors(batch)[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_padding_never_changes_a_score(run_dir, name):
    model, data = build(run_dir, make_cf(name))
    users, history, items = pick_known(model, data)
    users = torch.where(torch.arange(len(users)) % 2 == 0, users, -1)
    wide = torch.cat([torch.full((len(users), 3), -1), history], dim=1)
    narrow = [model.score(users[row : row + 1], history[row : row + 1][:, history[row] >= 0], items[row : row + 1])
              for row in range(len(users))]  # fmt: skip
    assert (model.score(users, wide, items) - torch.cat(narrow)).abs().max() < 1e-5
    assert (model.score(users, wide, items) - model.score(users, history, items)).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_no_later_item_influences_a_score(run_dir, name):
    """Replacing all later likes by other items leaves the scores of earlier rows unchanged."""
    model, data = build(run_dir, make_cf(name))
    rows = data.splits["test"]
    batch, _ = rows.take(torch.arange(rows.num_contexts), model.history_length)
    before = model(batch)
    for context in range(0, rows.num_contexts, 7):
        end = int(rows.history_ends[context])
        user = int(rows.user_idx[context])
        last = int(rows.history_ends[rows.user_idx == user].max())
        changed = rows.liked_items.clone()
        changed[end:last] = (changed[end:last] + 1) % NUM_ITEMS
        perturbed = type(rows)(**{**vars(rows), "liked_items": changed})
        again = model(perturbed.take(torch.arange(rows.num_contexts), model.history_length)[0])
        is_own = batch.target_contexts == context
        assert torch.equal(again[is_own], before[is_own])


@pytest.mark.parametrize("name", MODELS)
def test_unseen_items_share_the_learned_unknown_row(run_dir, name):
    """Items without training rows share the learned row; an unknown user without history has a zero vector."""
    model, _ = build(run_dir, make_cf(name))
    unseen = (~model.items.known[:-1]).nonzero().squeeze(1)
    assert len(unseen) >= 3  # the last three are held back from training
    unknown = torch.cat([unseen, torch.tensor([-1, NUM_ITEMS, NUM_ITEMS + 100])])
    history = torch.full((len(unknown), 2), -1)
    no_user = torch.full((len(unknown),), -1)
    scores = model.score(no_user, history, unknown)
    assert (scores - scores[0]).abs().max() < 1e-6
    assert torch.equal(model.item_vectors(unknown), torch.zeros(len(unknown), model.embedding_dim))
    vectors = model.user_vectors(no_user, history, unknown)
    assert vectors.abs().max() < 1e-6
    late = (~model.users.known).nonzero().squeeze(1)
    assert len(late) == 4  # in test only
    known_item = torch.zeros(len(late), dtype=torch.int64)
    liked = torch.arange(3).expand(len(late), 3)
    as_unknown = model.score(torch.full_like(late, -1), liked, known_item)
    assert torch.equal(model.score(late, liked, known_item), as_unknown)
    assert not torch.equal(as_unknown, model.score(torch.full_like(late, -1), liked[:, :0], known_item))


@pytest.mark.parametrize("name", MODELS)
def test_an_unknown_item_never_scores_by_a_random_draw(run_dir, name):
    """The unknown item starts at zero: it may occur too rarely to unlearn a random draw."""
    for seed in range(3):
        model, _ = build(run_dir, make_cf(name, unknown_item_share=0.2), seed=seed, spread=0.0)
        assert model.items.known[-1]
        assert torch.equal(model.items.weight[-1], torch.zeros(7))
        assert model.items.weight[:-1][model.items.known[:-1], :-1].abs().min() > 0


@pytest.mark.parametrize("name", MODELS)
def test_models_implement_the_protocol_and_targets_do_not_leak_between_rows(run_dir, name):
    model, data = build(run_dir, make_cf(name))
    assert isinstance(model, CfModel)
    users, history, items = pick_known(model, data)
    singles = [tuple(column[row : row + 1] for column in (users, history, items)) for row in range(9)]
    alone = torch.cat([model.score(*single) for single in singles])
    assert (model.score(users, history, items)[:9] - alone).abs().max() < 1e-5
    assert model.user_vectors(users, history, items).shape == (len(users), model.embedding_dim)
    other = model.user_vectors(users, history, items.flip(0))
    assert torch.equal(other, model.user_vectors(users, history, items)) is not model.depends_on_target
