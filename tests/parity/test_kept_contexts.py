"""Contexts kept between requests: the scores of a model that keeps nothing, within the memory granted."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.data.samples.pair_features import PAIR_FEATURES
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.packed.decoder import PackedDecoder, find_decoder
from collm_dist.llm.packed.kept_contexts import KeptContexts
from collm_dist.llm.packed.prefix_cache import PrefixCache
from collm_dist.llm.slot_mapping import SlotMapper
from tests.parity.test_shared_context import (
    ATTENTION,
    LISTS,
    STAGE1,
    STAGE2,
    TEXTS,
    Tables,
    make_block,
    make_collator,
)
from tests.tiny import ARCHITECTURES, make_model

SLOT_BEFORE = "<UserID> likes: <ItemTitleList>. And <TargetItemTitle> with <TargetItemID>? Answer:"
# Matmuls of other shapes sum in another order. Measured: up to 7.2e-7 in float32, 0 in float64, at scores of about 1.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


def build(template, folder, dtype=torch.float32, architecture="llama", attention=None):
    """Return a model and a collator for scoring."""
    has_slots = template != STAGE1
    tokenizer, collator = make_collator(template, folder, stage2=has_slots, tokens_per_slot=2)
    backbone = make_model(architecture, dtype=dtype)
    mapper = None
    if has_slots:
        pair_dim = len(PAIR_FEATURES) if "<MatchID>" in template else None
        mapper = SlotMapper(cf_dim=6, pair_dim=pair_dim, llm_dim=32, hidden_multiple=2, tokens_per_slot=2,
                            out_scale=0.3, seed=1).to(dtype)  # fmt: skip
    model = CollmModel(
        backbone,
        resolve_answer_ids(tokenizer, " Yes", " No"),
        "yes_minus_no",
        mapper,
        Tables() if has_slots else None,
        decoder=PackedDecoder(find_decoder(backbone), attention=attention),
    )
    return SimpleNamespace(model=model.eval(), collator=collator.for_scoring())


def score(side, block, max_bytes=None, kept=None):
    """Return the scores of a block, with a new store of kept contexts if ``max_bytes`` is given."""
    side.model.kept_contexts = KeptContexts(max_bytes) if max_bytes is not None else kept
    with torch.inference_mode():
        return side.model(side.collator.collate(block, block))


def make_request(users, random):
    """Return a block of some users, whose histories grow, in the state that they have now."""
    chosen = random.choice(len(users), random.integers(1, 4), replace=False)
    for user in chosen:
        if random.random() < 0.5:
            users[user] = [*users[user], int(random.integers(len(TEXTS)))]
    block = make_block([int(random.integers(1, 4)) for _ in chosen], seed=int(random.integers(1 << 30)))
    histories = [users[user] for user in chosen]
    return dataclasses.replace(
        block,
        user_idx=np.asarray(chosen, np.int64),
        num_likes=np.array([len(history) for history in histories], np.int64),
        history_offsets=np.concatenate([[0], np.cumsum([len(history) for history in histories])]),
        history_items=np.concatenate([np.array(history, np.int64) for history in histories]),
    )


def count_held(kept):
    """Return the bytes in the storages of a tree, and check that each node can be reached and is in order."""
    nodes = list(kept._order)
    place = {node: number for number, node in enumerate(nodes)}
    held = 0
    for node in nodes:
        assert node.parent.children[node.keys[0].tobytes()] is node
        assert node.parent.parent is None or place[node.parent] > place[node]  # so the first is a leaf
        held += node.states.untyped_storage().nbytes() + node.keys.nbytes
        assert node.states.shape[2] == len(node.keys) > 0
    return held


@pytest.mark.parametrize(
    ("template", "attention"),
    [(STAGE1, "blocks"), (STAGE2, "sequences"), (LISTS, "one-block"), (SLOT_BEFORE, "blocks")],
)
def test_any_sequence_of_requests_gets_the_same_scores(folder, template, attention):
    """A property: random users with growing histories, together and alone, while contexts are dropped or not."""
    side, random = build(template, folder, attention=ATTENTION[attention]), np.random.default_rng(7)
    users = [[int(item) for item in random.integers(0, len(TEXTS), count)] for count in (0, 0, 1, 2, 3)]
    stores = [KeptContexts(30_000), KeptContexts(10**9)]
    largest, found = 0.0, [0, 0]
    for _ in range(20):
        block = make_request(users, random)
        plain = score(side, block)
        for place, kept in enumerate(stores):
            largest = max(largest, float((score(side, block, kept=kept) - plain).abs().max()))
            assert count_held(kept) == kept.num_bytes <= kept.max_bytes
            found[place] += kept.take_counts().kept_tokens
    print(f"largest difference {largest:.1e}, {found} tokens found")
    assert 0 < found[0] < found[1]
    assert largest < TOLERANCE[torch.float32]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_extended_histories_on_every_architecture(folder, architecture):
    """Sliding windows, biases and parallel layers; a history grows event by event up to the prompt's limit."""
    side = build(STAGE2, folder, torch.float64, architecture)
    kept, largest = KeptContexts(10**9), 0.0
    for length in range(7):
        block = dataclasses.replace(
            make_block([3]), user_idx=np.array([1]), num_likes=np.array([length]),
            history_offsets=np.array([0, length]), history_items=np.arange(length),
        )  # fmt: skip
        largest = max(largest, float((score(side, block, kept=kept) - score(side, block)).abs().max()))
        counts = kept.take_counts()
        assert counts.whole == 0
        # One title is too short to be worth it. The prompt shows four: the fifth event drops the oldest, so everything
        # after the header has moved.
        assert counts.part == (3 <= length <= 4), (length, counts)
    print(f"largest difference {largest:.1e}")
    assert largest < TOLERANCE[torch.float64]


def make_user(user, history):
    """Return a block of one user with a history and two targets."""
    return dataclasses.replace(
        make_block([2]), user_idx=np.array([user]), num_likes=np.array([len(history)]),
        history_offsets=np.array([0, len(history)]), history_items=np.array(history),
    )  # fmt: skip


def test_equal_content_is_shared_and_other_content_is_not(folder):
    """Two users with equal histories share what precedes the slot of their vectors, and all of a prompt of text."""
    kept = KeptContexts(10**9)
    text = build(STAGE1, folder)
    for user in (1, 2):
        score(text, make_user(user, [0, 1]), kept=kept)
    assert kept.take_counts().whole == 1
    side, kept = build(STAGE2, folder), KeptContexts(10**9)
    first, second = (score(side, make_user(user, [0, 1]), kept=kept) for user in (1, 2))
    counts = kept.take_counts()
    assert (counts.none, counts.part, counts.whole) == (1, 1, 0)
    assert (first - second).abs().max() > 1e-3
    assert (second - score(side, make_user(2, [0, 1]))).abs().max() < TOLERANCE[torch.float32]
    # The same ids with other vectors in the slots, as after a change of the collaborative model.
    with torch.no_grad():
        side.model.cf_model.users[2] += 1
    assert (score(side, make_user(2, [0, 1]), kept=kept) - second).abs().max() > 1e-3
    assert kept.take_counts().whole == 0


def test_nothing_is_found_of_another_version_or_after_weights_may_have_changed(folder):
    side, block, kept = build(STAGE1, folder), make_user(1, [0, 1]), KeptContexts(10**9, "one")
    score(side, block, kept=kept)
    kept._version = "two"
    score(side, block, kept=kept)
    assert kept.take_counts().none == 2
    side.model.train()
    side.model.eval()
    assert kept.num_bytes == 0
    score(side, block, kept=kept)
    kept.drop()
    assert (kept.num_bytes, len(kept._order)) == (0, 0)
    score(side, block, kept=kept)
    assert kept.take_counts().none == 2


def test_least_recently_used_contexts_are_dropped_first(folder):
    side, kept = build(STAGE1, folder), KeptContexts(10**9)
    blocks = [make_user(1, history) for history in ([0], [1], [2])]
    for block in blocks:
        score(side, block, kept=kept)
    kept.max_bytes = kept.num_bytes
    score(side, blocks[0], kept=kept)
    score(side, make_user(1, [4]), kept=kept)  # a longer title
    kept.take_counts()
    score(side, blocks[0], kept=kept)
    assert kept.take_counts().whole == 1
    score(side, blocks[1], kept=kept)
    assert kept.take_counts().whole == 0
    small = KeptContexts(1000)  # less than a context
    assert torch.equal(score(side, blocks[0], kept=small), score(side, blocks[0]))
    assert small.num_bytes == 0


def test_running_out_of_memory_leaves_the_kept_contexts_as_they_were(folder):
    side, kept = build(STAGE1, folder), KeptContexts(10**9)
    score(side, make_user(1, [0, 1]), kept=kept)
    (node,) = kept._order
    states, calls = node.states, itertools.count()

    class Scarce:
        def __getitem__(self, place):
            if next(calls) == 1:  # the second part of the divided context
                raise torch.OutOfMemoryError
            return states[place]

    node.states = Scarce()
    with pytest.raises(torch.OutOfMemoryError):
        kept._split(node, len(node.keys) // 2)
    node.states = states
    for history in ([0, 1], [0, 2], [0, 1]):
        block = make_user(1, history)
        torch.testing.assert_close(score(side, block, kept=kept), score(side, block), atol=1e-5, rtol=0)


def test_contexts_in_several_micro_batches_are_kept_too(folder):
    side, block, kept = build(STAGE2, folder), make_block([2, 1, 3], seed=3), KeptContexts(10**9)
    plain = score(side, block)
    for _ in range(2):
        side.model.prefix_cache = PrefixCache(10**9)
        for _ in range(2):  # the second is found in the cache of the pass
            assert (score(side, block, kept=kept) - plain).abs().max() < TOLERANCE[torch.float32]
    counts = kept.take_counts()
    assert (counts.whole, counts.whole + counts.part + counts.none) == (3, 6)
    assert counts.saved_s > 0
    side.model.prefix_cache = None
