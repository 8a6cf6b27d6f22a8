"""Shuffling of slots between rows."""

from __future__ import annotations

import numpy as np
import torch

from collm_dist.data.samples.pair_features import compute_pair_features
from collm_dist.tuning.scoring import shuffle_slots
from tests.parity.test_shared_context import STAGE2, make_block, make_collator


def test_every_slot_gets_one_other_rows_input_in_any_micro_batch(tmp_path):
    _, collator = make_collator(STAGE2, tmp_path, stage2=True)
    block = make_block([2, 1, 7, 4, 1])
    whole = shuffle_slots(collator.collate(block, block), block, collator, seed=3)
    features = torch.from_numpy(compute_pair_features(block))
    part = np.arange(3, 9)
    piece = block.take_targets(part)
    cut = shuffle_slots(collator.collate(piece, block), block, collator, seed=3)
    torch.testing.assert_close(cut.pair_features, whole.pair_features[part])
    torch.testing.assert_close(cut.item_slots.sources, whole.item_slots.sources[part])
    # The shuffle is a permutation.
    torch.testing.assert_close(whole.pair_features.sort(dim=0)[0], features.sort(dim=0)[0])
    assert sorted(whole.item_slots.sources.tolist()) == sorted(block.item_idx.tolist())
    plain = collator.collate(block, block)
    torch.testing.assert_close(whole.tree_ids, plain.tree_ids)
