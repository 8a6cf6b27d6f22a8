"""Tests that need a GPU: shared contexts in GPU kernels and precisions, pinned batches, the automatic budget."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.data.samples.pair_features import PAIR_FEATURES
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.packed.decoder import PackedDecoder
from collm_dist.llm.packed.packing import Copies, lay_out
from collm_dist.llm.packed.row_blocks import Past
from collm_dist.llm.packed.sequences import flash_attention, lay_out_sequences
from collm_dist.llm.slot_mapping import SlotMapper
from collm_dist.prompt_batch import Mirrored, Segments
from collm_dist.tuning.step_batches import iter_step_batches
from collm_dist.tuning.token_budget import find_token_budget
from tests.parity.test_shared_context import STAGE2, TEXTS, Tables, collect_gradients, make_block, make_collator
from tests.reference.padded_rows import score_plainly, spell_prompts
from tests.reference.plain_sequences import attend_sequences
from tests.tiny import ARCHITECTURES, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
DEVICE = torch.device("cuda")
# bfloat16 has 8 bits: shared and padded rows round their sums in another order.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def build(architecture, dtype, tmp_path):
    """Return a tokenizer, its collator, a stage 2 model on the device, and a block."""
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


@pytest.mark.parametrize("layers", ["plain", "checkpointed", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_contexts_are_padded_rows(architecture, dtype, layers, tmp_path):
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
    if layers == "checkpointed":
        model.decoder = PackedDecoder(model.decoder.module, checkpointing=True)
    if layers == "compiled":
        model.decoder = PackedDecoder(model.decoder.module, compile_backend="inductor")
    model.train()
    scores = model(batch.to(DEVICE))
    gradients = collect_gradients(scores.sum(), model.slot_mapper)
    scale = plain.abs().max()
    assert (scores.cpu().double() - plain).abs().max() < TOLERANCE[dtype] * scale
    for name, value in plain_gradients.items():
        assert (gradients[name].cpu().double() - value).norm() < TOLERANCE[dtype] * 3 * value.norm(), name


@pytest.mark.parametrize("window", [None, 20], ids=["all", "window"])
@pytest.mark.parametrize("heads", [(4, 4, 64), (12, 2, 128), (4, 1, 256)], ids=lambda heads: f"width{heads[2]}")
@pytest.mark.parametrize("context", ["nothing", "header", "prefix"])
def test_flash_attention_of_sequences(context, heads, window):
    """Outputs and gradients, against the plain kernel in float64 on the same values."""
    tails, branches, owner = np.array([40, 0, 90, 3]), np.array([9, 1, 30, 7, 200, 8]), np.array([0, 0, 0, 1, 2, 3])
    on_host = Segments.build(tails, branches, owner)
    parts = (on_host.lengths, on_host.rows, on_host.tails)
    segments = Segments(*(Mirrored.of(part.numbers, DEVICE) for part in parts))
    lengths = Mirrored.of(tails + np.bincount(owner, branches).astype(np.int64), DEVICE)
    header = 0 if context == "nothing" else 11
    past = None
    if context == "prefix":
        prefix_lengths = Mirrored.of([30, 5, 30, 60], DEVICE)
        past = Past(header + 95, prefix_lengths, header + torch.tensor([0, 30, 0, 35], device=DEVICE))
    layout = lay_out_sequences(segments, lengths, header, past)
    count, shared, width = int(lengths.numbers.sum()), header if past is None else 0, heads[2]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(tokens, num_heads):
        return torch.randn(tokens, num_heads, width, generator=generator, device=DEVICE).bfloat16()

    query, key, value = draw(shared + count, heads[0]), draw(shared + count, heads[1]), draw(shared + count, heads[1])
    earlier = [draw(header + 95, heads[1]) if past is not None else None for _ in range(2)]
    weights = draw(shared + count, heads[0])
    results = []
    for attend, device, dtype in (
        (flash_attention, DEVICE, torch.bfloat16),
        (attend_sequences, "cpu", torch.float64),
    ):
        sequences = move(layout, device)
        leaves = [values.to(device, dtype).requires_grad_() for values in (query, key, value)]
        laid_out = []
        for packed, past_values in zip(leaves[1:], earlier, strict=True):
            header_values, own = torch.split(packed, [shared, count])
            cells = lay_out(
                own,
                sequences.key_tokens,
                sequences.key_cells,
                whole=packed if past_values is None else torch.cat([past_values.to(device, dtype), packed]),
                header=None if sequences.header_cells is None else header_values,
                header_cells=sequences.header_cells,
            )
            laid_out.append(cells)
        result = attend(sequences, leaves[0], *laid_out, scaling=None, dropout=0.0, window=window)
        gradients = torch.autograd.grad((result * weights.to(device, dtype)).sum(), leaves)
        results.append([values.detach().cpu().double() for values in (result, *gradients)])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() < 0.01 * expected.norm()


def move(layout, device):
    """Return the same layout on another device."""
    moved = {
        field.name: value.to(device)
        for field in dataclasses.fields(layout)
        if isinstance(value := getattr(layout, field.name), torch.Tensor)
    }
    copies = Copies(layout.key_cells.cells.to(device), layout.key_cells.starts.to(device))
    return dataclasses.replace(layout, key_cells=copies, **moved)


def test_batches_come_from_pinned_memory(tmp_path):
    _, collator, _, block = build("llama", torch.float32, tmp_path)
    prepared = next(iter_step_batches(iter([block]), collator, 1000, DEVICE))
    first = prepared.micro_batches[0]
    assert first.tree_ids.is_pinned()
    moved = first.to(DEVICE)
    torch.cuda.synchronize()
    assert torch.equal(moved.tree_ids.cpu(), first.tree_ids)


def test_automatic_budget_fits(tmp_path):
    _, collator, model, block = build("llama", torch.bfloat16, tmp_path)
    budget = find_token_budget(model, collator, block, DEVICE)
    assert budget.tokens * budget.bytes_per_token <= max(budget.free_bytes, 2**20)
