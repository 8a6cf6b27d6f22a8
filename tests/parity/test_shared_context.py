"""Shared contexts against plain padded rows: scores, loss and gradients, for every kind of backbone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from collm_dist.data.prompts.item_tokens import load_item_tokens
from collm_dist.data.prompts.micro_batches import plan_micro_batches
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.prompts.prompt_template import PromptTemplate, resolve_answer_ids
from collm_dist.data.samples.pair_features import PAIR_FEATURES
from collm_dist.data.shards.context_block import TARGET_FIELDS, ContextBlock
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.lora import add_lora, make_trainable
from collm_dist.llm.packed.decoder import PackedDecoder, find_decoder
from collm_dist.llm.packed.prefix_cache import PrefixCache
from collm_dist.llm.packed.row_blocks import PaddedBlocks
from collm_dist.llm.packed.sequences import Sequences
from collm_dist.llm.slot_mapping import SlotMapper
from tests.reference.padded_rows import score_plainly, spell_prompts
from tests.reference.plain_sequences import attend_sequences
from tests.tiny import ARCHITECTURES, make_model, make_tokenizer

STAGE1 = "Likes: <ItemTitleList>. And <TargetItemTitle>? Answer:"
STAGE2 = "Likes: <ItemTitleList>. User <UserID>. And <TargetItemTitle> with <TargetItemID>, <MatchID>? Answer:"
LISTS = "<UserID> likes <ItemIDList> named <ItemTitleList>. And <TargetItemID>? Answer:"
SLOTS_FIRST = "<UserID><TargetItemID> Answer:"
TEXTS = ["Heat", 'A "quoted" one', "<UserID>", "<unk> </s>", "é漢字 \u202e", "x" * 40, "", "Alien <TargetItemID>"]
# float64, but transformers' norms and rotary embeddings round to float32 inside (6e-8). Measured: errors up to 3e-16
# for scores, where both ways round alike, and up to 3e-8 (relative) for gradients, where sums come in another order.
SCORE_TOLERANCE, GRADIENT_TOLERANCE = 1e-10, 1e-6


# Blocks without any padding; all rows in one block; sequences, by a plain kernel instead of the GPU's (see tests/gpu).
ATTENTION = {"blocks": PaddedBlocks(0), "one-block": PaddedBlocks(1 << 30), "sequences": Sequences(attend_sequences)}


@pytest.fixture(params=ATTENTION)
def attention(request):
    """Each way for packed tokens to attend."""
    return ATTENTION[request.param]


def make_block(targets_per_context: list[int], seed: int = 0) -> ContextBlock:
    rng = np.random.default_rng(seed)
    contexts, targets = len(targets_per_context), sum(targets_per_context)
    histories = rng.integers(0, 6, contexts)
    histories[0] = 0
    values = {name: rng.integers(0, 5, targets) for name in TARGET_FIELDS}
    values |= {f"{side}_rows": values[f"{side}_likes"] + 1 for side in ("user", "item")}
    values["item_idx"] = rng.integers(0, len(TEXTS), targets)
    values["label"] = rng.integers(0, 2, targets)
    values["row_id"] = np.arange(targets)
    return ContextBlock(
        user_idx=rng.integers(0, 5, contexts),
        num_likes=np.arange(contexts),
        history_offsets=np.concatenate([[0], np.cumsum(histories)]),
        history_items=rng.integers(0, len(TEXTS), histories.sum()),
        target_offsets=np.concatenate([[0], np.cumsum(targets_per_context)]),
        dislike_offsets=np.zeros(targets + 1, dtype=np.int64),
        dislike_items=np.zeros(0, dtype=np.int64),
        **values,
    )


class Tables(torch.nn.Module):
    """A collaborative model of two tables."""

    embedding_dim = 6

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.users = torch.nn.Parameter(torch.randn(5, 6, generator=generator, dtype=torch.float64))
        self.items = torch.nn.Parameter(torch.randn(len(TEXTS), 6, generator=generator, dtype=torch.float64))

    def user_vectors(self, user_idx, history, target, timestamp):
        return self.users[user_idx]

    def item_vectors(self, item_idx, timestamp):
        return self.items[item_idx]


def make_collator(
    template: str,
    tmp_path,
    *,
    stage2: bool,
    tokens_per_slot: int = 1,
    by_target: bool = False,
    most: int = 1000,
    scores_titles: bool = False,
):
    tokenizer = make_tokenizer()
    return tokenizer, PromptCollator(
        PromptTemplate.parse(template, allow_slots=stage2, user_depends_on_target=by_target),
        load_item_tokens(tmp_path, TEXTS, tokenizer, max_tokens=100),
        tokenizer,
        history_length=4,
        cf_history_length=4,
        max_prompt_tokens=most,
        empty_history_text="(nothing yet)",
        tokens_per_slot=tokens_per_slot,
        user_depends_on_target=by_target,
        scores_titles=scores_titles,
    )


def make_adapted_model(architecture):
    """Return a backbone in float64 with an adapter that changes it."""
    backbone = make_model(architecture)
    targets = ("query_key_value",) if architecture == "gpt_neox" else ("q_proj", "v_proj")
    add_lora(backbone, rank=2, alpha=4, dropout=0.0, target_modules=targets, seed=1)
    backbone.double()
    torch.manual_seed(3)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:  # initially zero, which would leave the other half without gradients
            torch.nn.init.normal_(parameter, std=0.2)
    return backbone


def compute_loss(scores, batch):
    return binary_cross_entropy_with_logits(scores.double(), batch.labels.double())


def collect_gradients(loss, module):
    names, parameters = zip(*[(n, p) for n, p in module.named_parameters() if p.requires_grad], strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_gradients_close(ours, plain):
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        error = (ours[name] - value).norm() / value.norm().clamp_min(1e-30)
        assert error < GRADIENT_TOLERANCE, f"{name}: relative error {error:.1e}, tolerance {GRADIENT_TOLERANCE}"


@pytest.fixture(autouse=True)
def _exact_head(monkeypatch):
    """Compute the head in float64, so that rounding cannot hide an error.

    Positions stay float32: older transformers multiply them by float32 frequencies.
    """
    to_float32 = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda value: value.double() if value.is_floating_point() else to_float32(value)
    )


def make_fully_trainable_model(architecture):
    """Return a backbone in float64 of which all weights of the layers train."""
    backbone = make_model(architecture)
    assert make_trainable(backbone, rank="full", alpha=1, dropout=0.0, target_modules="all", seed=1) is None
    return backbone


@pytest.mark.parametrize("make", [make_adapted_model, make_fully_trainable_model], ids=["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stage1_scores_and_gradients(architecture, checkpointing, make, attention, tmp_path):
    tokenizer, collator = make_collator(STAGE1, tmp_path, stage2=False)
    block = make_block([1, 3, 9, 2])
    backbone = make(architecture)
    answers = resolve_answer_ids(tokenizer, " Yes", " No")
    batch = collator.collate(block, block)
    samples = spell_prompts(block, STAGE1, TEXTS, tokenizer, history_length=4)
    plain = score_plainly(backbone, samples, block, answers)
    plain_gradients = collect_gradients(compute_loss(plain, batch), backbone)

    decoder = PackedDecoder(find_decoder(backbone), attention=attention, checkpointing=checkpointing)
    model = CollmModel(backbone, answers, "yes_minus_no", decoder=decoder)
    model.train()
    scores = model(batch)
    assert (scores - plain).abs().max() < SCORE_TOLERANCE
    assert_gradients_close(collect_gradients(compute_loss(scores, batch), backbone), plain_gradients)


@pytest.mark.parametrize("rank", [2, "full"])
def test_the_backbones_own_dropout_stays_off(rank, tmp_path):
    """Its masks would follow from the order of calls, so a step would depend on micro-batches and on a resume."""
    tokenizer, collator = make_collator(STAGE1, tmp_path, stage2=False)
    block = make_block([1, 3, 2])
    backbone = make_model("gpt2")
    assert backbone.config.attn_pdrop > 0
    assert backbone.config.resid_pdrop > 0
    make_trainable(backbone, rank=rank, alpha=4, dropout=0.0, target_modules=("c_attn",), seed=1)
    answers = resolve_answer_ids(tokenizer, " Yes", " No")
    samples = spell_prompts(block, STAGE1, TEXTS, tokenizer, history_length=4)
    plain = score_plainly(backbone, samples, block, answers)
    model = CollmModel(backbone, answers, "yes_minus_no").train()
    assert (model(collator.collate(block, block)) - plain).abs().max() < SCORE_TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("template", [STAGE2, LISTS, SLOTS_FIRST], ids=["stage2", "lists", "slots-first"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stage2_scores_and_mapping_gradients(architecture, template, checkpointing, attention, tmp_path):
    width = 2 if template == LISTS else 1
    tokenizer, collator = make_collator(template, tmp_path, stage2=True, tokens_per_slot=width)
    block = make_block([2, 1, 7, 4, 1])
    backbone, tables = make_model(architecture), Tables()
    has_pair = "<MatchID>" in template
    mapper = SlotMapper(
        cf_dim=6,
        pair_dim=len(PAIR_FEATURES) if has_pair else None,
        llm_dim=32,
        hidden_multiple=3,
        tokens_per_slot=width,
        out_scale=0.15,
        seed=2,
    ).double()
    answers = resolve_answer_ids(tokenizer, " Yes", " No")
    batch = collator.collate(block, block)
    batch = dataclasses.replace(batch, pair_features=batch.pair_features.double())
    samples = spell_prompts(block, template, TEXTS, tokenizer, history_length=4, tokens_per_slot=width)
    plain = score_plainly(
        backbone, samples, block, answers, slot_mapper=mapper, cf_model=tables, pair_features=batch.pair_features
    )
    loss = compute_loss(plain, batch)
    plain_gradients = collect_gradients(loss, torch.nn.ModuleList([mapper, tables]))

    decoder = PackedDecoder(find_decoder(backbone), attention=attention, checkpointing=checkpointing)
    model = CollmModel(backbone, answers, "yes_minus_no", mapper, tables, detach_cf=False, decoder=decoder)
    model.train()
    scores = model(batch)
    assert (scores - plain).abs().max() < SCORE_TOLERANCE
    ours = collect_gradients(compute_loss(scores, batch), torch.nn.ModuleList([mapper, tables]))
    assert_gradients_close(ours, plain_gradients)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_large_contexts_and_target_dependent_users(architecture, implementation, attention, tmp_path):
    tokenizer, collator = make_collator(STAGE2, tmp_path, stage2=True, by_target=True)
    block = make_block([54, 1], seed=4)
    # transformers' own eager masks overflow in float64, so the reference is SDPA either way.
    backbone, tables = make_model(architecture), Tables()
    mapper = SlotMapper(
        cf_dim=6, pair_dim=len(PAIR_FEATURES), llm_dim=32, hidden_multiple=3, tokens_per_slot=1, out_scale=0.1, seed=2
    ).double()
    answers = resolve_answer_ids(tokenizer, " Yes", " No")
    batch = collator.collate(block, block)
    batch = dataclasses.replace(batch, pair_features=batch.pair_features.double())
    assert len(batch.user_idx) == block.num_targets
    samples = spell_prompts(block, STAGE2, TEXTS, tokenizer, history_length=4)
    plain = score_plainly(
        backbone, samples, block, answers, slot_mapper=mapper, cf_model=tables, pair_features=batch.pair_features
    )
    backbone = make_model(architecture, attention=implementation)
    decoder = PackedDecoder(find_decoder(backbone), attention=attention)
    scores = CollmModel(backbone, answers, "yes_minus_no", mapper, tables, decoder=decoder)(batch)
    # Eager attention takes its softmax in float32.
    assert (scores - plain).abs().max() < (1e-5 if implementation == "eager" else SCORE_TOLERANCE)


def test_a_context_divided_between_batches_scores_the_same(attention, tmp_path):
    tokenizer, collator = make_collator(STAGE2, tmp_path, stage2=True)
    block = make_block([6, 5])
    backbone, tables = make_model("llama"), Tables()
    mapper = SlotMapper(
        cf_dim=6, pair_dim=len(PAIR_FEATURES), llm_dim=32, hidden_multiple=3, tokens_per_slot=1, out_scale=0.1, seed=2
    ).double()
    decoder = PackedDecoder(find_decoder(backbone), attention=attention)
    model = CollmModel(backbone, resolve_answer_ids(tokenizer, " Yes", " No"), "yes", mapper, tables, decoder=decoder)

    def score(part: ContextBlock) -> torch.Tensor:
        batch = collator.collate(part, part)
        return model(dataclasses.replace(batch, pair_features=batch.pair_features.double()))

    whole = score(block)
    parts = [score(block.take_targets(np.arange(first, last))) for first, last in ((0, 4), (4, 8), (8, 11))]
    assert (torch.cat(parts) - whole).abs().max() < SCORE_TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("template", [STAGE1, STAGE2], ids=["stage1", "stage2"])
def test_scoring_many_candidates_of_a_context(architecture, template, attention, tmp_path):
    """In scoring the whole context is constant, and several rows of its targets share it."""
    stage2 = template == STAGE2
    tokenizer, collator = make_collator(template, tmp_path, stage2=stage2)
    block = make_block([40, 1, 25])
    backbone, tables = make_model(architecture), Tables()
    mapper = SlotMapper(
        cf_dim=6, pair_dim=len(PAIR_FEATURES), llm_dim=32, hidden_multiple=3, tokens_per_slot=1, out_scale=0.1, seed=2
    ).double()
    answers = resolve_answer_ids(tokenizer, " Yes", " No")
    decoder = PackedDecoder(find_decoder(backbone), attention=attention)
    parts = (mapper, tables) if stage2 else (None, None)
    model = CollmModel(backbone, answers, "yes_minus_no", *parts, decoder=decoder)
    features = collator.collate(block, block).pair_features.double()
    samples = spell_prompts(block, template, TEXTS, tokenizer, history_length=4)
    plain = score_plainly(
        backbone, samples, block, answers, slot_mapper=mapper, cf_model=tables, pair_features=features
    )
    scoring = collator.for_scoring()
    counts = scoring.count_tokens(block)
    assert (counts.prefix > 0).all()
    pieces = plan_micro_batches(block, counts, 0, 1, 2000)
    assert any(piece.num_contexts > len(np.unique(piece.num_likes)) for piece in pieces)
    scores = torch.zeros(block.num_targets, dtype=torch.float64)
    for cache in (None, PrefixCache(10**9)):
        model.prefix_cache = cache
        for piece in [*pieces, *pieces]:
            batch = scoring.collate(piece, block)
            batch = dataclasses.replace(batch, pair_features=batch.pair_features.double())
            with torch.no_grad():
                scores[batch.row_ids] = model(batch)
        assert (scores - plain).abs().max() < SCORE_TOLERANCE
    assert model.prefix_cache.hits >= model.prefix_cache.misses == len(torch.unique(torch.tensor(block.num_likes)))


def test_a_full_or_partial_cache_scores_the_same(attention, tmp_path):
    tokenizer, collator = make_collator(STAGE2, tmp_path, stage2=True)
    block = make_block([2, 1, 3, 1, 4])
    backbone, tables = make_model("llama"), Tables()
    mapper = SlotMapper(
        cf_dim=6, pair_dim=len(PAIR_FEATURES), llm_dim=32, hidden_multiple=3, tokens_per_slot=1, out_scale=0.1, seed=2
    ).double()
    decoder = PackedDecoder(find_decoder(backbone), attention=attention)
    model = CollmModel(backbone, resolve_answer_ids(tokenizer, " Yes", " No"), "yes", mapper, tables, decoder=decoder)

    def score(part: ContextBlock) -> torch.Tensor:
        batch = collator.collate(part, part)
        return model(dataclasses.replace(batch, pair_features=batch.pair_features.double()))

    plain = score(block)
    gradients = collect_gradients(plain.sum(), mapper)
    model.prefix_cache = PrefixCache(80_000)
    score(block.take_contexts(np.array([1, 3])))
    num_bytes = model.prefix_cache.num_bytes
    assert 0 < num_bytes <= 80_000
    for _ in range(2):
        again = score(block)
        assert (again - plain).abs().max() < SCORE_TOLERANCE
        assert_gradients_close(collect_gradients(again.sum(), mapper), gradients)
    assert num_bytes <= model.prefix_cache.num_bytes <= 80_000
    assert model.prefix_cache.hits >= 4
    assert model.prefix_cache.misses > 5
