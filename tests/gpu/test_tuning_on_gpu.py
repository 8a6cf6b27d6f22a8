"""What only a GPU can show: the shared path in its kernels and precisions, pinned batches, the automatic budget."""

from __future__ import annotations

import pytest
import torch

from collm_dist.data.prompts import resolve_answer_ids
from collm_dist.data.statistics import PAIR_FEATURES
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.compiled_layers import compile_layers
from collm_dist.llm.mapping import SlotMapper
from collm_dist.llm.shared_context import enable_activation_checkpointing
from collm_dist.tuning.prepared import prepare
from collm_dist.tuning.token_budget import find_token_budget
from tests.parity.test_shared_context import STAGE2, TEXTS, Tables, collect_gradients, make_block, make_collator
from tests.reference.padded_rows import score_plainly, spell_prompts
from tests.tiny import ARCHITECTURES, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
DEVICE = torch.device("cuda")
# bfloat16 has 8 bits: shared and padded rows round their sums in another order.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def build(architecture, dtype, tmp_path):
    """A model of stage 2 on the device, its collator and a block."""
    tokenizer, collator = make_collator(STAGE2, tmp_path, stage2=True)
    backbone = make_model(architecture, dtype=dtype)
    mapper = SlotMapper(
        cf_dim=6, pair_dim=len(PAIR_FEATURES), llm_dim=32, hidden_multiple=3, tokens_per_slot=1, out_scale=0.15, seed=2
    )
    model = CollmModel(
        backbone, resolve_answer_ids(tokenizer, " Yes", " No"), "yes_minus_no", mapper.to(dtype), Tables().float()
    )
    model.cf_model.to(DEVICE)
    return tokenizer, collator, model.to(DEVICE), make_block([2, 1, 7, 4, 1])


@pytest.mark.parametrize("way", ["plain", "checkpointed", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_contexts_are_padded_rows(architecture, dtype, way, tmp_path):
    tokenizer, collator, model, block = build(architecture, dtype, tmp_path)
    batch = collator.collate(block, block)
    samples = spell_prompts(block, STAGE2, TEXTS, tokenizer, history_length=4)
    tables = Tables()
    reference = make_model(architecture, dtype=torch.float64)
    plain_mapper = SlotMapper(
        cf_dim=6, pair_dim=len(PAIR_FEATURES), llm_dim=32, hidden_multiple=3, tokens_per_slot=1, out_scale=0.15, seed=2
    ).double()
    plain = score_plainly(
        reference, samples, block, resolve_answer_ids(tokenizer, " Yes", " No"), slot_mapper=plain_mapper,
        cf_model=tables, pair_features=batch.pair_features.double(),
    )  # fmt: skip
    plain_gradients = collect_gradients(plain.sum(), plain_mapper)
    if way == "checkpointed":
        enable_activation_checkpointing(model.decoder)
    if way == "compiled":
        compile_layers(model.decoder)
    model.train()
    scores = model(batch.to(DEVICE))
    gradients = collect_gradients(scores.sum(), model.slot_mapper)
    scale = plain.abs().max()
    assert (scores.cpu().double() - plain).abs().max() < TOLERANCE[dtype] * scale
    for name, value in plain_gradients.items():
        assert (gradients[name].cpu().double() - value).norm() < TOLERANCE[dtype] * 3 * value.norm(), name


def test_batches_come_from_pinned_memory(tmp_path):
    _, collator, _, block = build("llama", torch.float32, tmp_path)
    prepared = next(prepare(iter([block]), collator, 1000, DEVICE))
    first = prepared.micro_batches[0]
    assert first.tree_ids.is_pinned()
    moved = first.to(DEVICE)
    torch.cuda.synchronize()
    assert torch.equal(moved.tree_ids.cpu(), first.tree_ids)


def test_automatic_budget_fits(tmp_path):
    _, collator, model, block = build("llama", torch.bfloat16, tmp_path)
    budget = find_token_budget(model, collator, block, DEVICE)
    assert budget.tokens * budget.bytes_per_token <= max(budget.free_bytes, 2**20)
