"""Slots without LLM: inputs and training."""

import numpy as np
import torch

from collm_dist.data.samples.pair_features import PAIR_FEATURES, compute_pair_features
from collm_dist.data.shards.context_block import pad_histories
from collm_dist.evaluation.slot_inputs import build_slot_inputs, list_slots
from collm_dist.evaluation.slots_mlp import fit_slots_mlp
from collm_dist.metrics import compute_auc
from tests.unit.evaluation_data import build_block


class TableModel:
    """Vectors by index; a user's also depends on the last liked item; the unknown index -1 is zero."""

    def __init__(self, size=10, width=3):
        self.table = torch.arange(1.0, size * width + 1).view(size, width)

    def item_vectors(self, item_idx, timestamp):
        return torch.where(item_idx[:, None] >= 0, self.table[item_idx.clamp(min=0)], 0.0)

    def user_vectors(self, user_idx, history, target, timestamp):
        return 100 * self.item_vectors(user_idx, timestamp) + self.item_vectors(history[:, -1], timestamp)


def test_slots_of_a_prompt():
    assert list_slots("a <ItemTitleList> <UserID> b <TargetItemTitle> <MatchID>") == {"UserID", "MatchID"}
    assert list_slots("plain <ItemTitleList>") == frozenset()


def test_histories_are_right_aligned():
    block = build_block([0, 1, 2], histories=[[1, 2, 3], [], [4]])
    assert pad_histories(block, 2).tolist() == [[2, 3], [-1, -1], [-1, 4]]
    assert pad_histories(block, 4).tolist() == [[-1, 1, 2, 3], [-1] * 4, [-1, -1, -1, 4]]


def test_inputs_are_exactly_the_contents_of_the_slots():
    block = build_block([0, 1], histories=[[1, 2], []], item_idx=[4, 5], item_rows=[7, 8], item_likes=[3, 8])
    model = TableModel()
    user = torch.stack([100 * model.table[0] + model.table[2], 100 * model.table[1]]).numpy()
    item, pair = model.table[[4, 5]].numpy(), compute_pair_features(block)
    assert np.array_equal(build_slot_inputs(block, frozenset({"MatchID"}), None, 5, 5), pair)
    both = build_slot_inputs(block, frozenset({"UserID", "TargetItemID", "MatchID"}), model, 5, 5)
    assert np.array_equal(both, np.concatenate([user, item, user * item, pair], axis=1))
    assert both.shape == (2, 9 + len(PAIR_FEATURES))
    liked = build_slot_inputs(block, frozenset({"ItemIDList"}), model, 5, 5)
    assert np.array_equal(liked, np.stack([model.table[[1, 2]].mean(dim=0).numpy(), np.zeros(3)]))


def test_training_learns_is_reproducible_and_accepts_a_single_label():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(2000, 6)).astype(np.float32)
    inputs[:, 5] = 1.0  # a constant input must not divide by zero
    labels = (inputs[:, 0] * inputs[:, 1] + 0.3 * random.normal(size=2000) > 0).astype(np.int64)
    train, valid = (inputs[:1500], labels[:1500]), (inputs[1500:], labels[1500:])
    state = torch.get_rng_state()
    scores = fit_slots_mlp(train, valid, seed=0).score(valid[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert compute_auc(valid[1], scores) > 0.85
    assert np.array_equal(scores, fit_slots_mlp(train, valid, seed=0).score(valid[0]))
    one_label = (inputs[1500:], np.ones(500, dtype=np.int64))
    assert np.isfinite(fit_slots_mlp(train, one_label, seed=0, num_epochs=2).score(valid[0])).all()
