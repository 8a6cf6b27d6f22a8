import dataclasses
import itertools
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collm_dist.data.prompts.item_tokens import load_item_tokens, load_user_tokens
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.prompts.prompt_template import PromptTemplate
from collm_dist.data.prompts.slot_codes import Masking
from collm_dist.data.samples.pair_features import PAIR_FEATURES, compute_pair_features
from collm_dist.data.shards.context_block import concatenate_blocks
from collm_dist.errors import ConfigError
from collm_dist.prompt_batch import Mirrored, Segments, Slots
from tests.reference.plain_prompts import build_plain_prompt, merge_events
from tests.unit.loader_data import make_contexts, make_tokenizer

STAGE1 = "Liked so far: <ItemTitleList>.\nWould this person like <TargetItemTitle> as well?\nAnswer:"
STAGE2 = "Liked: <ItemTitleList>. By <UserID>. Like <TargetItemTitle>, or <TargetItemID> <MatchID>?\nAnswer:"
TEMPLATES = {
    "text": STAGE1,
    "slots": STAGE2,
    "slots_first": "<UserID> likes <ItemTitleList>; also <TargetItemTitle>?",
    "ids": "Liked <ItemIDList> and <ItemTitleList>. Like <TargetItemID>?",
    "target_first": "<TargetItemTitle> or <TargetItemID> for <UserID>?",
    "feedback": "Liked: <ItemTitleList>. Not: <DislikedTitleList>. Like <TargetItemTitle>?",
    "feedback_after_slot": "By <UserID>, not <DislikedTitleList>, but <ItemIDList>. Like <TargetItemID>?",
    "feedback_alone": "Not: <DislikedTitleList>. By <UserID>. Like <TargetItemTitle>?",
    "user_text": "Of <UserText>. Liked: <ItemTitleList>. By <UserID>. Like <TargetItemTitle>?",
    "user_text_after_slot": "By <UserID>: <UserText><DislikedTitleList>. Like <TargetItemTitle>?",
    "rated": "Rated: <RatedTitleList>. By <UserID>. Like <TargetItemTitle>?",
    "rated_and_all": "<UserText> <RatedTitleList> <DislikedTitleList> <ItemTitleList> <TargetItemTitle>?",
    "user_first": "<UserID><TargetItemID><MatchID> good?",
}
ODD_TITLES = [
    *("<UserID>", "<unk>", "<s></s>", "\u05e9\u05dc\u200f", "\U0001f600\u200d\U0001f467", '"', ", ", "", "\n\t"),
    *("<ItemTitleList>", "\x00\u00e9", "Heat"),
]
# The last one is that of users without a text.
USER_TEXTS = ["24, <UserText> of </s> Delft", None, "\u4e2d " * 12, "(not known)"]
titles_strategy = st.lists(
    st.one_of(st.sampled_from(ODD_TITLES), st.text(st.characters(exclude_categories=["Cs"]), max_size=30)),
    min_size=1,
    max_size=8,
)


def make_collator(template, titles, *, tokenizer=None, user_depends_on_target=False, **options):
    tokenizer = tokenizer or make_tokenizer()
    has_slots = any(f"<{name}>" in template for name in ("UserID", "ItemIDList", "TargetItemID", "MatchID"))
    parsed = PromptTemplate.parse(template, allow_slots=has_slots, user_depends_on_target=user_depends_on_target)
    values = {
        "history_length": 4,
        "max_prompt_tokens": 2000,
        "empty_history_text": "(none)",
        "cf_history_length": 5,
        "tokens_per_slot": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        items = load_item_tokens(Path(folder), titles, tokenizer, 12)
        if "<UserText>" in template:
            values["user_tokens"] = load_user_tokens(Path(folder), USER_TEXTS[:-1], USER_TEXTS[-1], tokenizer, 15)
    return PromptCollator(
        parsed, items, tokenizer, user_depends_on_target=user_depends_on_target, **{**values, **options}
    )


def find_user_text(row):
    """Return the text of a row of the table; -1 = no row."""
    return USER_TEXTS[row] or USER_TEXTS[-1]


def list_dislikes(block, target, length):
    return block.dislike_items[slice(*block.dislike_offsets[target : target + 2])].tolist()[-length:]


def list_rated(block, target, length):
    """Return (item, 1 = liked) of the last items before a target."""
    context = block.target_contexts[target]
    history = block.history_items[slice(*block.history_offsets[context : context + 2])].tolist()
    places = slice(*block.dislike_offsets[target : target + 2])
    dislikes, since = block.dislike_items[places].tolist(), block.likes_since[places].tolist()
    return merge_events(history, dislikes, since)[-length:]


def read_back(batch, tokens_per_slot):
    """Return each target's token ids, position ids and slot starts in the plain prompt."""
    slots = {"user": batch.user_slots, "item": batch.item_slots, "pair": batch.pair_slots}
    rows, starts = batch.tree_lengths.list_rows(), batch.prefix_lengths.list_starts()
    prompts = []
    for target in range(len(batch.labels)):
        row = int(rows[batch.last[target]])
        shared = int(batch.prefix_rows.tensor[row])
        own = torch.arange(int(batch.prefix_lengths.tensor[shared])) + starts[shared]
        prefix = batch.header_ids.tolist() + batch.prefix_ids[own].tolist()
        seen = (rows == row) & ((batch.tree_targets == -1) | (batch.tree_targets == target))
        columns = torch.nonzero(seen)[:, 0].tolist()
        ids = prefix + batch.tree_ids[columns].tolist()
        # Position in the plain prompt of each token of prefixes and tree.
        places = {place: len(batch.header_ids) + column for column, place in enumerate(own.tolist())}
        places |= {len(batch.prefix_ids) + column: len(prefix) + place for place, column in enumerate(columns)}
        assert columns[-1] == batch.last[target]
        assert batch.tree_positions[columns].tolist() == list(range(len(prefix), len(ids)))
        found = {
            kind: [
                (places[int(place)], int(source))
                for place, source in zip(value.places, value.sources, strict=True)
                if int(place) in places
            ]
            for kind, value in slots.items()
        }
        for taken in found.values():
            for place, _ in taken:
                assert ids[place : place + tokens_per_slot] == [0] * tokens_per_slot
        prompts.append((ids, found))
    return prompts


@settings(max_examples=150, deadline=None)
@given(
    titles=titles_strategy,
    name=st.sampled_from(sorted(TEMPLATES)),
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    seed=st.integers(0, 3),
    tokens_per_slot=st.integers(1, 3),
    slack=st.integers(0, 40),
    adds_bos=st.booleans(),
    user_depends_on_target=st.booleans(),
    scores=st.booleans(),
    disliked_length=st.integers(1, 3),
    rated_length=st.integers(1, 4),
    no_dislikes=st.sampled_from([None, "nothing at all"]),
)
def test_every_prompt_equals_the_plain_one(
    titles, name, counts, seed, tokens_per_slot, slack, adds_bos, user_depends_on_target, scores,
    disliked_length, rated_length, no_dislikes,
):  # fmt: skip
    template, tokenizer = TEMPLATES[name], make_tokenizer(adds_bos=adds_bos)
    if user_depends_on_target and name in ("slots_first", "feedback_after_slot", "user_text_after_slot"):
        return  # the history may not stand after something that differs between targets
    block = make_contexts(counts, num_items=len(titles), seed=seed)
    if seed:  # as in requests
        block = dataclasses.replace(block, text_rows=np.arange(seed - 2, seed - 2 + len(counts)) % 4 - 1)
    options = {"tokenizer": tokenizer, "user_depends_on_target": user_depends_on_target}
    options["tokens_per_slot"] = tokens_per_slot
    options |= {"disliked_length": disliked_length, "empty_dislikes_text": no_dislikes, "rated_length": rated_length}
    try:
        make_collator(template, titles, max_prompt_tokens=1, **options)
        pytest.fail("a prompt of one token")
    except ConfigError as error:
        least = int(re.search(r"needs (\d+) tokens", str(error)).group(1))
    collator = make_collator(template, titles, max_prompt_tokens=least + slack, **options)
    if scores:
        collator = collator.for_scoring()
        assert not collator.template.tail
    block = collator.cut_contexts(block)
    batch = collator.collate(block, block)
    dropped = dropped_dislikes = dropped_ratings = 0
    for target, (ids, slots) in enumerate(read_back(batch, tokens_per_slot)):
        context = block.target_contexts[target]
        history = block.history_items[slice(*block.history_offsets[context : context + 2])].tolist()
        plain = build_plain_prompt(
            tokenizer,
            template,
            titles,
            history,
            int(block.item_idx[target]),
            history_length=4,
            max_title_tokens=12,
            max_prompt_tokens=least + slack,
            empty_history_text="(none)",
            tokens_per_slot=tokens_per_slot,
            bos=[0] if adds_bos else [],
            dislikes=(dislikes := list_dislikes(block, target, disliked_length)),
            empty_dislikes_text=no_dislikes,
            user_text=find_user_text((block.user_idx if block.text_rows is None else block.text_rows)[context]),
            max_user_text_tokens=15,
            rated=(rated := list_rated(block, target, rated_length)),
        )
        assert ids == plain.input_ids
        assert len(ids) <= least + slack
        query = target if user_depends_on_target else context
        if any(segment.text == "<UserID>" for segment in collator.template.prefix):
            # Contexts of one user whose dislikes were all dropped share the prefix, and the slot in it.
            shared = batch.prefix_rows.numbers.tolist()
            query = shared.index(shared[context])
        assert slots["user"] == [(start, query) for start in plain.slots.get("UserID", [])]
        items = list(zip(plain.slots.get("ItemIDList", []), plain.history, strict=False))
        items += [(start, int(block.item_idx[target])) for start in plain.slots.get("TargetItemID", [])]
        assert sorted(slots["item"]) == sorted(items)
        assert slots["pair"] == [(start, target) for start in plain.slots.get("MatchID", [])]
        if target == block.target_offsets[context]:
            dropped += min(len(history), 4) - len(plain.history)
            dropped_dislikes += len(dislikes) - len(plain.dislikes) if "<Disliked" in template else 0
            dropped_ratings += len(rated) - len(plain.rated) if "<Rated" in template else 0
    counts = collator.num_dropped_history, collator.num_dropped_dislikes, collator.num_dropped_ratings
    assert counts == (dropped, dropped_dislikes, dropped_ratings)
    tokens = collator.count_tokens(block)
    assert tokens.header == len(batch.header_ids)
    assert tokens.prefix.tolist() == batch.prefix_lengths.numbers[batch.prefix_rows.numbers].tolist()
    widths = tokens.tail + np.add.reduceat(tokens.branch, block.target_offsets[:-1])
    assert widths.tolist() == batch.tree_lengths.numbers.tolist()
    assert batch.num_tokens == tokens.header + batch.prefix_lengths.numbers.sum() + widths.sum()
    segments = batch.tree_segments
    rows = batch.tree_lengths.list_rows().tolist()
    tokens_of = zip(rows, batch.tree_targets.tolist(), strict=True)
    runs = [(token, len(list(run))) for token, run in itertools.groupby(tokens_of)]
    assert segments.lengths.numbers.tolist() == [length for _, length in runs]
    assert segments.rows.numbers.tolist() == [row for (row, _), _ in runs]
    assert segments.tails.numbers.tolist() == [0 if target < 0 else tokens.tail[row] for (row, target), _ in runs]


def test_equal_prefixes_are_laid_out_once_and_what_all_begin_with_is_the_header():
    titles = [f"Film {number}" for number in range(20)]
    one, other = make_contexts([3]), make_contexts([2], seed=5)
    block = concatenate_blocks([one.take_targets(np.array([0])), other, one.take_targets(np.array([1, 2]))])
    tokenizer = make_tokenizer(adds_bos=True)
    batch = make_collator(STAGE2, titles, tokenizer=tokenizer).collate(block, block)
    assert batch.prefix_rows.numbers.tolist() == [1, 0, 1]  # the shortest is first
    assert len(batch.prefix_lengths) == len(batch.prefix_keys) == 2
    assert len(batch.prefix_ids) == batch.prefix_lengths.numbers.sum()
    assert batch.header_ids.tolist() == [
        tokenizer.bos_token_id,
        *tokenizer("Liked: ", add_special_tokens=False)["input_ids"],
    ]


def test_rows_share_a_prefix_with_slots_only_if_its_slots_are_equal():
    """All contexts have the same two titles, since only two are included."""
    histories = [[1, 2], [1, 2], [3, 1, 2], [1, 2], [1, 2]]
    offsets = np.cumsum([0, *map(len, histories)])
    block = dataclasses.replace(
        make_contexts([1] * 5),
        user_idx=np.array([-1, -1, -1, 4, -1]),
        num_likes=np.full(5, 7),
        history_offsets=offsets,
        history_items=np.concatenate(histories),
        timestamp=np.array([10, 11, 10, 10, 20]),
    )
    titles = [f"Film {number}" for number in range(20)]
    collator = make_collator(STAGE2, titles, history_length=2, time_cuts=[15])
    assert collator.collate(block, block).prefix_rows.numbers.tolist() == [0, 0, 0, 0, 0]
    batch = collator.for_scoring().collate(block, block)
    # The second differs by its time alone, within the same cut; the others by an older like, the user, and a cut.
    assert batch.prefix_rows.numbers.tolist() == [0, 0, 1, 2, 3]
    assert batch.user_slots.sources.tolist() == [0, 2, 3, 4]
    assert collator.for_scoring(slots=False) is collator


def test_prompts_do_not_depend_on_their_batch():
    titles = [f"Movie number {n} " * (n % 4 + 1) for n in range(20)]
    block = make_contexts([2, 3, 1, 2])
    collator = make_collator(STAGE2, titles, max_prompt_tokens=95)
    whole = [ids for ids, _ in read_back(collator.collate(block, block), 1)]
    alone = [
        read_back(collator.collate(block.take_targets(np.array([n])), block), 1)[0][0] for n in range(block.num_targets)
    ]
    assert whole == alone
    assert collator.num_dropped_history > 0


def test_queries_carry_user_history_and_target():
    block = make_contexts([2, 1, 3])
    shared = make_collator(STAGE2, ["a"] * 20).collate(block, block)
    assert shared.user_idx.tolist() == block.user_idx.tolist()
    assert shared.user_target.tolist() == [-1] * 3
    for context in range(3):
        history = block.history_items[slice(*block.history_offsets[context : context + 2])].tolist()[-5:]
        assert shared.user_history[context].tolist() == [-1] * (5 - len(history)) + history
    each = make_collator(STAGE2, ["a"] * 20, user_depends_on_target=True).collate(block, block)
    assert each.user_target.tolist() == block.item_idx.tolist()
    assert each.user_idx.tolist() == block.user_idx[block.target_contexts].tolist()
    assert torch.equal(each.user_history, shared.user_history[block.target_contexts])
    assert each.pair_features.shape == (6, len(PAIR_FEATURES))
    np.testing.assert_array_equal(each.pair_features.numpy(), compute_pair_features(block))
    assert each.labels.tolist() == block.label.tolist()
    assert each.row_ids.tolist() == block.row_id.tolist()


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_filler_has_the_same_parts_and_no_weight(name):
    collator = make_collator(TEMPLATES[name], ["a b", "c"])
    example = make_contexts([1], num_items=2, max_history=1, seed=3)
    real, filler = collator.collate(example, example), collator.collate(None, example)
    assert filler.weights.tolist() == [0.0]
    assert (len(filler.prefix_ids) > 0) == (len(real.prefix_ids) > 0)
    for kind in ("user_slots", "item_slots", "pair_slots"):
        assert (len(getattr(filler, kind).places) > 0) == (len(getattr(real, kind).places) > 0)
    for part in dataclasses.fields(filler):
        value, other = getattr(filler, part.name), getattr(real, part.name)
        if part.name == "header_key":
            assert value == other
        elif not isinstance(value, Mirrored | Segments | Slots):
            assert value.dtype == other.dtype, part.name
            assert value.ndim == other.ndim, part.name


def test_masks_belong_to_rows_and_only_to_training():
    block = make_contexts([3] * 60)
    collator = make_collator(TEMPLATES["slots"], ["a"] * 20)
    assert not collator.collate(block, block).item_slots.masked.any()
    batch = collator.collate(block, block, Masking(0.3, 0, 1))
    for slots in (batch.user_slots, batch.item_slots, batch.pair_slots):
        share = slots.masked.float().mean().item()
        assert abs(share - 0.3) < 4 * (0.21 / len(slots.masked)) ** 0.5
    part = collator.collate(block.take_targets(np.arange(30, 60)), block, Masking(0.3, 0, 1))
    assert torch.equal(part.item_slots.masked, batch.item_slots.masked[30:60])
    assert torch.equal(part.user_slots.masked, batch.user_slots.masked[10:20])
    assert not torch.equal(
        collator.collate(block, block, Masking(0.3, 0, 2)).item_slots.masked, batch.item_slots.masked
    )
    assert not torch.equal(batch.pair_slots.masked, batch.item_slots.masked)


def test_contexts_are_cut_only_where_the_listed_dislikes_change():
    block = make_contexts([6, 5, 1])
    assert make_collator(STAGE1, ["a"] * 20).cut_contexts(block) is block
    collator = make_collator(TEMPLATES["feedback"], ["a"] * 20, disliked_length=1)
    with pytest.raises(AssertionError, match="cut contexts"):
        collator.collate(block, block)
    cut = collator.cut_contexts(block)
    dislikes = [list_dislikes(block, target, 1) for target in range(block.num_targets)]
    owner = block.target_contexts
    starts = [n for n in range(12) if n == 0 or owner[n] != owner[n - 1] or dislikes[n] != dislikes[n - 1]]
    assert cut.target_offsets.tolist() == [*starts, 12]
    assert cut.row_id.tolist() == block.row_id.tolist()
    # Equal titles: the prefixes share tokens, and dropout keys are those of the uncut contexts.
    keys = make_collator(STAGE1, ["a"] * 20).collate(block, block).context_keys
    assert collator.collate(cut, cut).context_keys.tolist() == keys[torch.tensor(owner[starts])].tolist()


def test_prefixes_with_other_dislikes_are_distinct():
    titles = [f"title {number}" for number in range(20)]
    block = make_contexts([6, 5, 1])
    collator = make_collator(TEMPLATES["feedback_alone"], titles)
    cut = collator.cut_contexts(block)
    batch = collator.collate(cut, cut)
    lists = [tuple(list_dislikes(cut, target, 5)) for target in cut.target_offsets[:-1]]
    assert len(set(batch.prefix_keys.tolist())) == len(set(lists))
    numbers = batch.prefix_rows.numbers.tolist()
    assert len(set(zip(lists, numbers, strict=True))) == len(set(lists)) == len(set(numbers))


def test_contexts_are_cut_only_where_the_rated_titles_change():
    block = make_contexts([6, 5, 1])
    collator = make_collator(TEMPLATES["rated"], ["a"] * 20, rated_length=2)
    with pytest.raises(AssertionError, match="cut contexts"):
        collator.collate(block, block)
    cut = collator.cut_contexts(block)
    offsets, owner = block.dislike_offsets, block.target_contexts
    lists = [
        [(int(block.dislike_items[n]), int(block.likes_since[n])) for n in range(*offsets[target : target + 2])][-2:]
        for target in range(block.num_targets)
    ]
    starts = [n for n in range(12) if n == 0 or owner[n] != owner[n - 1] or lists[n] != lists[n - 1]]
    assert cut.target_offsets.tolist() == [*starts, 12]
