"""Compiled layers against plain ones: the same scores and gradients, from few graphs for batches of any shape."""

from __future__ import annotations

import pytest
import torch

from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.data.samples.pair_features import PAIR_FEATURES
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.lora import add_lora
from collm_dist.llm.packed.decoder import PackedDecoder
from collm_dist.llm.packed.prefix_cache import PrefixCache
from collm_dist.llm.slot_mapping import SlotMapper
from tests.parity.test_shared_context import STAGE1, STAGE2, Tables, collect_gradients, make_block, make_collator
from tests.tiny import ARCHITECTURES, make_model

CONTEXTS = ([2, 1, 7, 4, 1], [3, 3], [9], [1, 1, 1, 1, 1, 1], [4])
# float32. Measured: scores differ by up to 1e-6, gradients by up to 1e-6 (relative).
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(architecture, stage2, tmp_path, dropout=0.0, layers=2):
    """Return a model in float32, and batches of several shapes."""
    tokenizer, collator = make_collator(STAGE2 if stage2 else STAGE1, tmp_path, stage2=stage2)
    backbone = make_model(architecture, dtype=torch.float32, layers=layers)
    answers = resolve_answer_ids(tokenizer, " Yes", " No")
    batches = [collator.collate(block, block) for block in map(make_block, CONTEXTS)]
    if stage2:
        mapper = SlotMapper(
            cf_dim=6, pair_dim=len(PAIR_FEATURES), llm_dim=32, hidden_multiple=3, tokens_per_slot=1, out_scale=0.15,
            seed=2,
        )  # fmt: skip
        return CollmModel(backbone, answers, "yes_minus_no", mapper, Tables().float()), batches
    targets = ("query_key_value",) if architecture == "gpt_neox" else ("q_proj", "v_proj")
    add_lora(backbone, rank=2, alpha=4, dropout=dropout, target_modules=targets, seed=1)
    torch.manual_seed(3)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return CollmModel(backbone, answers, "yes_minus_no"), batches


def work(model, batches):
    """Return scores and gradients in training, and scores without gradients."""
    results = []
    for batch in batches:
        model.train()
        torch.manual_seed(7)
        scores = model(batch)
        gradients = collect_gradients(scores.square().sum(), model)
        model.eval()
        with torch.no_grad():
            results.append((scores.detach(), gradients, model(batch)))
    return results


def assert_same(ours, plain):
    for (scores, gradients, scored), (their_scores, their_gradients, their_scored) in zip(ours, plain, strict=True):
        assert (scores - their_scores).abs().max() < TOLERANCE
        assert (scored - their_scored).abs().max() < TOLERANCE
        assert gradients.keys() == their_gradients.keys()
        for name, value in their_gradients.items():
            assert (gradients[name] - value).norm() <= TOLERANCE * value.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("stage2", "checkpointing"), [(False, False), (True, True)])
def test_traced_layers(architecture, stage2, checkpointing, tmp_path):
    """The graphs that would be compiled, without the minute of code generation."""
    model, batches = build(architecture, stage2, tmp_path)
    plain = work(model, batches)
    model.decoder = PackedDecoder(model.decoder.module, compile_backend="aot_eager", checkpointing=checkpointing)
    assert_same(work(model, batches), plain)
    if stage2:
        model.prefix_cache = PrefixCache(10**9)
        for _ in range(2):
            assert_same(work(model, batches), plain)


@pytest.mark.slow
@pytest.mark.parametrize("stage2", [False, True], ids=["stage1", "stage2"])
def test_layers_share_their_graphs(stage2, tmp_path):
    """Four layers with dropout need no more graphs than two, and no new graphs after all kinds of batches.

    The first layer's input has no gradient in stage 1, so two layers could hide a graph for each.
    """
    model, batches = build("llama", stage2, tmp_path, dropout=0.3, layers=4)
    torch._dynamo.utils.counters.clear()
    model.decoder = PackedDecoder(model.decoder.module, compile_backend="aot_eager")
    work(model, batches)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # Before attention, after it, and the MLP; with gradients and without. Measured: 11, 12.
    assert 0 < graphs <= 12
    work(model, [*batches, *reversed(batches)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.parametrize("stage2", [False, True], ids=["stage1", "stage2"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_layers(architecture, stage2, tmp_path):
    """With dropout in stage 1, whose masks equal those of uncompiled layers."""
    model, batches = build(architecture, stage2, tmp_path, dropout=0.3)
    plain = work(model, batches)
    model.decoder = PackedDecoder(model.decoder.module, compile_backend="inductor")
    assert_same(work(model, batches), plain)
