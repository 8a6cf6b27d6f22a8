"""Decoders over packed tokens: what is shared, what is left out, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM

from collm_dist.errors import ConfigError
from collm_dist.llm.packed import decoder as packed_attention
from collm_dist.llm.packed import passes as shared_context
from collm_dist.llm.packed import row_blocks
from collm_dist.llm.packed.decoder import find_layers, prepare_decoder
from collm_dist.llm.packed.packing import collect, lay_out, spread
from collm_dist.llm.packed.passes import enable_activation_checkpointing, run_prefix, run_tree
from collm_dist.llm.packed.row_blocks import Masks, RowSpan
from collm_dist.llm.packed.row_layout import Past, lay_out_rows
from collm_dist.prompt_batch import TAIL, Mirrored
from tests.tiny import ARCHITECTURES, make_model

# float64. Measured: up to 2e-15; transformers' norms and rotary embeddings round to float32 alike on both sides.
TOLERANCE = 1e-12
LENGTHS = (7, 3, 5)
BLOCKS = pytest.mark.parametrize("cost", [0, 1 << 20], ids=["blocks", "one_block"])


@pytest.fixture(autouse=True)
def divided(request, monkeypatch):
    """Let attention lay out rows one by one, or all together with padding."""
    if "cost" in request.fixturenames:
        monkeypatch.setitem(row_blocks.BLOCK_COST, "cpu", request.getfixturevalue("cost"))


def make_rows(width=32):
    """Rows of several lengths without branches: embeddings, targets, positions, lengths."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(sum(LENGTHS), width, generator=generator, dtype=torch.float64)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return embeds, torch.full_like(positions, TAIL), positions, Mirrored.of(LENGTHS)


def run_alone(decoder, embeds, before=None):
    """Each row by itself, as transformers runs it, after tokens that all of them begin with."""
    rows = [row if before is None else torch.cat([before, row]) for row in embeds.split(LENGTHS)]
    start = 0 if before is None else len(before)
    return torch.cat([decoder(inputs_embeds=row[None]).last_hidden_state[0, start:] for row in rows])


@BLOCKS
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2"])
def test_rows_of_several_lengths_equal_rows_alone_and_plain_passes_stay_as_they_were(architecture, cost):
    decoder = make_gpt2() if architecture == "gpt2" else make_model(architecture).get_decoder()
    embeds, *layout = make_rows()
    plain = run_alone(decoder, embeds)
    assert (run_tree(decoder, embeds, *layout) - plain).abs().max() < TOLERANCE
    assert (run_alone(decoder, embeds) - plain).abs().max() < TOLERANCE


@BLOCKS
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_header_is_shared_with_its_gradients(architecture, checkpointing, cost):
    """The first tokens of all rows at once, against each row with tokens of its own."""
    decoder = make_model(architecture).get_decoder()
    rest, targets, positions, lengths = make_rows()
    header = torch.randn(10, 32, dtype=torch.float64).requires_grad_()  # longer than the window that some models have
    hidden = run_alone(decoder, rest, header)
    (expected,) = torch.autograd.grad(hidden.square().sum(), header)
    if checkpointing:
        enable_activation_checkpointing(decoder)
    ours = run_tree(decoder, rest, targets, 10 + positions, lengths, header=header)
    assert (ours - hidden).abs().max() < TOLERANCE
    (found,) = torch.autograd.grad(ours.square().sum(), header)
    # Norms round to float32 inside, and sums come in another order. Measured: up to 4e-8.
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_network_runs_on_what_is_needed(architecture):
    decoder = make_model(architecture).get_decoder()
    embeds, *layout = make_rows()
    rows = embeds.clone().requires_grad_()
    hidden = run_tree(decoder, rows, *layout)
    needed = torch.tensor([6, 9, 14])  # the last token of each row
    (expected,) = torch.autograd.grad(hidden[needed].square().sum(), rows)
    seen = []
    network = find_layers(decoder)[-1].mlp
    handle = next(network.children()).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    part = run_tree(decoder, rows, *layout, needed=needed)
    handle.remove()
    assert seen == [3]
    assert (part - hidden)[needed].abs().max() < TOLERANCE
    (found,) = torch.autograd.grad(part[needed].square().sum(), rows)
    assert (found - expected).norm() < 1e-6 * expected.norm()


@BLOCKS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prefix_goes_on_after_its_header(architecture, cost):
    """Header and prefixes one after the other, and tree rows over both, against each row with tokens of its own."""
    decoder = make_model(architecture).get_decoder()
    embeds, targets, positions, lengths = make_rows()
    start = torch.randn(10, 32, dtype=torch.float64)  # longer than the window that some models have
    header = run_prefix(decoder, start, Mirrored.of([10]))
    together = run_prefix(decoder, embeds, lengths, header)
    whole = torch.cat([part for row in embeds.split(LENGTHS) for part in (start, row)])
    alone = run_prefix(decoder, whole, Mirrored.of([10 + length for length in LENGTHS]))
    assert (together.header, together.lengths.numbers.tolist()) == (10, list(LENGTHS))
    sizes = [size for length in LENGTHS for size in (10, length)]
    for ours, expected in zip(together.layers, alone.layers, strict=True):
        for found, one in zip(ours, expected, strict=True):
            parts = one[0].split(sizes)
            assert (torch.cat(found) - torch.cat([parts[0], *parts[1::2]])).abs().max() < TOLERANCE
    for rows in (None, Mirrored.of([2, 0, 2])):
        seen = lengths.tensor if rows is None else lengths.tensor[rows.tensor]
        shifted = positions + 10 + seen[lengths.list_rows()]
        found, expected = (
            run_tree(decoder, embeds, targets, shifted, lengths, dataclasses.replace(one, rows=rows))
            for one in (together, alone)
        )
        assert (found - expected).abs().max() < TOLERANCE


@BLOCKS
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_prefix_may_be_empty(architecture, cost):
    """As that of a user without a history, if nothing is said of that."""
    decoder = make_model(architecture).get_decoder()
    embeds, targets, positions, lengths = make_rows()
    start = torch.randn(10, 32, dtype=torch.float64)
    header = run_prefix(decoder, start, Mirrored.of([10]))
    prefix = run_prefix(decoder, embeds[:4], Mirrored.of([0, 0, 4]), header)
    shifted = positions + 10 + torch.tensor([0, 0, 4])[lengths.list_rows()]
    found = run_tree(decoder, embeds, targets, shifted, lengths, prefix).split(LENGTHS)
    rows = zip(found, embeds.split(LENGTHS), (embeds[:0], embeds[:0], embeds[:4]), strict=True)
    for ours, row, before in rows:
        whole = torch.cat([start, before, row])[None]
        assert (ours - decoder(inputs_embeds=whole).last_hidden_state[0, -len(row) :]).abs().max() < TOLERANCE


def test_what_is_packed_comes_back_with_its_gradients():
    places = torch.tensor([0, 1, 3, 4, 5])
    tokens = torch.arange(10, dtype=torch.float64).view(5, 2).requires_grad_()
    rows = spread(tokens, places, 6)
    assert (rows[2] == 0).all()
    assert torch.equal(collect(rows, places), tokens)
    assert torch.autograd.gradcheck(lambda one: spread(one, places, 6), (tokens,))
    assert torch.autograd.gradcheck(lambda one: collect(one, places), (rows.detach().requires_grad_(),))
    sources = torch.tensor([0, 1, 0, 2, 3, 4])
    assert torch.equal(collect(lay_out(tokens, sources, places), places), tokens)
    # What stands at padding is not looked at, so its gradient is none.
    assert torch.autograd.gradcheck(lambda one: collect(lay_out(one, sources, places), places), (tokens,))


def test_what_stands_ahead_of_every_row_has_the_sum_of_its_gradients():
    header = torch.tensor([[5.0, 6], [7, 8]], dtype=torch.float64).requires_grad_()
    tokens = torch.arange(6, dtype=torch.float64).view(3, 2).requires_grad_()
    # Two rows, of the header and two tokens, and of the header, a token and padding.
    sources, places = torch.tensor([0, 1, 2, 3, 0, 1, 4, 0]), torch.tensor([2, 3, 6])
    shared = torch.tensor([[0, 1], [4, 5]])
    weights = torch.randn(8, 2, dtype=torch.float64)
    weights[7] = 0

    def lay(ahead, own):
        whole = torch.cat([ahead, own]).detach()
        return (lay_out(own, sources, places, whole=whole, ahead=ahead, shared=shared) * weights).sum()

    assert torch.equal(lay_out(tokens, sources, places, whole=torch.cat([header, tokens]))[5], header[1])
    assert torch.autograd.gradcheck(lay, (header, tokens))


def test_rows_stand_in_blocks_behind_what_they_see():
    """Against places counted by hand: three rows in two blocks, over pasts of one and two tokens and a header."""
    lengths = Mirrored.of([1, 2, 2])
    spans = [RowSpan(slice(0, 2), slice(0, 3), 2, 2), RowSpan(slice(2, 3), slice(3, 5), 2, 1)]
    past = Past(4, Mirrored.of([1, 2, 1]), torch.tensor([1, 2, 1]))
    layout = lay_out_rows(lengths, spans, [Masks(None)] * 2, 1, past)
    assert [(one.rows, one.columns, one.keys) for one in layout.blocks] == [(2, 2, 5), (1, 2, 4)]
    header, padding = 0, 0
    assert layout.keys.tolist() == [
        *(header, 1, padding, 4, padding), *(header, 2, 3, 5, 6), *(header, 1, 7, 8)
    ]  # fmt: skip
    assert layout.key_places.tolist() == [3, 8, 9, 12, 13]
    queries = torch.randn(5, 4, 3)
    laid = lay_out(queries, layout.queries, layout.query_places)
    assert torch.equal(laid[2:4], queries[1:3])
    assert torch.equal(laid[4:], queries[3:])
    assert torch.equal(collect(laid, layout.found), queries)


def test_attention_in_a_way_of_its_own_is_refused():
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("stablelm", vocab_size=300, num_key_value_heads=4, **settings)
    with pytest.raises(ConfigError, match="a stablelm model computes attention in a way of its own"):
        prepare_decoder(AutoModelForCausalLM.from_config(config).get_decoder())
    config = AutoConfig.for_model("jamba", vocab_size=300, num_experts=1, **settings)
    with pytest.raises(ConfigError, match="a jamba model has layers of type linear_attention"):
        prepare_decoder(AutoModelForCausalLM.from_config(config).get_decoder())


def test_attention_that_the_kernel_for_sequences_does_not_know_is_refused(monkeypatch):
    """Were its soft cap called otherwise in a configuration than what is looked for before."""
    monkeypatch.setattr(shared_context, "takes_sequences", lambda *_: True)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("gemma2", vocab_size=300, num_key_value_heads=2, head_dim=8, **settings)
    decoder = AutoModelForCausalLM.from_config(config).get_decoder()
    with pytest.raises(ConfigError, match=r"Gemma2Attention attends in a way .*; set llm\.attention=eager"):
        run_prefix(decoder, torch.randn(3, 32), Mirrored.of([3]))


def make_gpt2():
    """A decoder that calls its layers otherwise and learns its positions."""
    config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False).get_decoder()


@BLOCKS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_over_a_prefix_are_laid_out_again_in_the_backward_pass(architecture, cost, monkeypatch):
    """They are not kept for it; gradients, the second time as well, are what they are if they are."""
    decoder = make_model(architecture).get_decoder()
    embeds, targets, positions, lengths = make_rows()
    before = Mirrored.of([20, 10, 15])
    prefix = run_prefix(decoder, torch.randn(45, 32, dtype=torch.float64), before)
    shifted = positions + before.tensor[lengths.list_rows()]
    laid = []

    def lay_out_and_note(*args, whole=None, **others):
        found = lay_out(*args, whole=whole, **others)
        if whole is not None:
            laid.append(StorageWeakRef(found.untyped_storage()))
        return found

    def run():
        laid.clear()
        tokens = embeds.detach().requires_grad_()
        hidden = run_tree(decoder, tokens, targets, shifted, lengths, prefix)
        kept = sum(not one.expired() for one in laid)
        return kept, *(torch.autograd.grad(hidden.sum(), tokens, retain_graph=more)[0] for more in (True, False))

    monkeypatch.setattr(packed_attention, "lay_out", lay_out_and_note)
    kept, first, second = run()
    monkeypatch.setattr(packed_attention, "recompute_in_backward", lambda *those: contextlib.nullcontext())
    kept_plainly, expected, _ = run()
    assert (kept, kept_plainly) == (0, len(laid))
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
