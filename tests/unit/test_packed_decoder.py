"""Decoders over packed tokens: shared tokens, needed tokens, changes and their order, refusals."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM

from collm_dist.errors import ConfigError
from collm_dist.llm.packed import attention as packed_attention
from collm_dist.llm.packed.attention import ATTENTION
from collm_dist.llm.packed.decoder import PackedDecoder
from collm_dist.llm.packed.packing import gather, lay_out, scatter
from collm_dist.llm.packed.passes import run_prefix, run_tree
from collm_dist.llm.packed.row_blocks import Masks, PaddedBlocks, Past, RowSpan, lay_out_rows
from collm_dist.llm.packed.sequences import Sequences
from collm_dist.prompt_batch import TAIL, Mirrored
from tests.tiny import ARCHITECTURES, make_model

# float64. Measured: up to 2e-15; transformers' norms and rotary embeddings round to float32 alike on both sides.
TOLERANCE = 1e-12
LENGTHS = (7, 3, 5)
# Rows one by one, or all together with padding.
BLOCKS = pytest.mark.parametrize("blocks", [PaddedBlocks(0), PaddedBlocks(1 << 20)], ids=["blocks", "one_block"])


def make_rows(width=32):
    """Rows of several lengths without branches: embeddings, targets, positions, lengths."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(sum(LENGTHS), width, generator=generator, dtype=torch.float64)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return embeds, torch.full_like(positions, TAIL), positions, Mirrored.of(LENGTHS)


def run_alone(module, embeds, header=None):
    """Run each row by itself, as transformers does, after tokens that all of them begin with."""
    rows = [row if header is None else torch.cat([header, row]) for row in embeds.split(LENGTHS)]
    start = 0 if header is None else len(header)
    return torch.cat([module(inputs_embeds=row[None]).last_hidden_state[0, start:] for row in rows])


@BLOCKS
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2"])
def test_rows_of_several_lengths_equal_rows_alone_and_plain_passes_do_not_change(architecture, blocks):
    module = make_gpt2() if architecture == "gpt2" else make_model(architecture).get_decoder()
    embeds, *layout = make_rows()
    plain = run_alone(module, embeds)
    decoder = PackedDecoder(module, attention=blocks)
    assert (run_tree(decoder, embeds, *layout) - plain).abs().max() < TOLERANCE
    assert (run_alone(module, embeds) - plain).abs().max() < TOLERANCE


@BLOCKS
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_header_is_shared_with_its_gradients(architecture, checkpointing, blocks):
    """The first tokens of all rows at once, against each row with its own."""
    module = make_model(architecture).get_decoder()
    rest, targets, positions, lengths = make_rows()
    header = torch.randn(10, 32, dtype=torch.float64).requires_grad_()  # longer than the window that some models have
    hidden = run_alone(module, rest, header)
    (expected,) = torch.autograd.grad(hidden.square().sum(), header)
    decoder = PackedDecoder(module, attention=blocks, checkpointing=checkpointing)
    output = run_tree(decoder, rest, targets, 10 + positions, lengths, header=header)
    assert (output - hidden).abs().max() < TOLERANCE
    (gradient,) = torch.autograd.grad(output.square().sum(), header)
    # Norms round to float32 inside, and sums come in another order. Measured: up to 4e-8.
    assert (gradient - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_mlp_runs_on_needed_tokens(architecture, checkpointing):
    module = make_model(architecture).get_decoder()
    decoder = PackedDecoder(module, checkpointing=checkpointing)
    embeds, *layout = make_rows()
    rows = embeds.clone().requires_grad_()
    hidden = run_tree(decoder, rows, *layout)
    needed = torch.tensor([6, 9, 14])  # the last token of each row
    (expected,) = torch.autograd.grad(hidden[needed].square().sum(), rows)
    counts = []
    mlp = module.layers[-1].mlp
    handle = next(mlp.children()).register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    output = run_tree(decoder, rows, *layout, needed=needed)
    assert counts == [3]
    assert (output - hidden)[needed].abs().max() < TOLERANCE
    run_alone(module, embeds)  # between the passes: a plain pass needs all tokens
    (gradient,) = torch.autograd.grad(output[needed].square().sum(), rows)
    handle.remove()
    assert counts == [3, *LENGTHS, *([3] if checkpointing else [])]
    assert (gradient - expected).norm() < 1e-6 * expected.norm()


@BLOCKS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prefix_continues_its_header(architecture, blocks):
    """Header and prefixes one after the other, and tree rows after both, against each row with its own tokens."""
    decoder = PackedDecoder(make_model(architecture).get_decoder(), attention=blocks)
    embeds, targets, positions, lengths = make_rows()
    start = torch.randn(10, 32, dtype=torch.float64)  # longer than the window that some models have
    header = run_prefix(decoder, start, Mirrored.of([10]))
    together = run_prefix(decoder, embeds, lengths, header)
    whole = torch.cat([part for row in embeds.split(LENGTHS) for part in (start, row)])
    alone = run_prefix(decoder, whole, Mirrored.of([10 + length for length in LENGTHS]))
    assert (together.header, together.lengths.numbers.tolist()) == (10, list(LENGTHS))
    sizes = [size for length in LENGTHS for size in (10, length)]
    for layer, expected_layer in zip(together.layers, alone.layers, strict=True):
        for parts, (expected,) in zip(layer, expected_layer, strict=True):
            pieces = expected.split(sizes)
            assert (torch.cat(parts) - torch.cat([pieces[0], *pieces[1::2]])).abs().max() < TOLERANCE
    for rows in (None, Mirrored.of([2, 0, 2])):
        prefix_lengths = lengths.tensor if rows is None else lengths.tensor[rows.tensor]
        shifted = positions + 10 + prefix_lengths[lengths.list_rows()]
        output, expected = (
            run_tree(decoder, embeds, targets, shifted, lengths, dataclasses.replace(prefix, rows=rows))
            for prefix in (together, alone)
        )
        assert (output - expected).abs().max() < TOLERANCE


@BLOCKS
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_prefix_may_be_empty(architecture, blocks):
    """As for a user without a history, if the prompt has no text for that."""
    module = make_model(architecture).get_decoder()
    decoder = PackedDecoder(module, attention=blocks)
    embeds, targets, positions, lengths = make_rows()
    start = torch.randn(10, 32, dtype=torch.float64)
    header = run_prefix(decoder, start, Mirrored.of([10]))
    prefix = run_prefix(decoder, embeds[:4], Mirrored.of([0, 0, 4]), header)
    shifted = positions + 10 + torch.tensor([0, 0, 4])[lengths.list_rows()]
    outputs = run_tree(decoder, embeds, targets, shifted, lengths, prefix).split(LENGTHS)
    rows = zip(outputs, embeds.split(LENGTHS), (embeds[:0], embeds[:0], embeds[:4]), strict=True)
    for output, row, row_prefix in rows:
        whole = torch.cat([start, row_prefix, row])[None]
        assert (output - module(inputs_embeds=whole).last_hidden_state[0, -len(row) :]).abs().max() < TOLERANCE


def test_packed_tokens_come_back_with_their_gradients():
    cells = torch.tensor([0, 1, 3, 4, 5])
    tokens = torch.arange(10, dtype=torch.float64).view(5, 2).requires_grad_()
    rows = scatter(tokens, cells, 6)
    assert (rows[2] == 0).all()
    assert torch.equal(gather(rows, cells), tokens)
    assert torch.autograd.gradcheck(lambda values: scatter(values, cells, 6), (tokens,))
    assert torch.autograd.gradcheck(lambda values: gather(values, cells), (rows.detach().requires_grad_(),))
    cell_tokens = torch.tensor([0, 1, 0, 2, 3, 4])
    assert torch.equal(gather(lay_out(tokens, cell_tokens, cells), cells), tokens)
    # The content of padding is ignored, and so is its gradient.
    assert torch.autograd.gradcheck(lambda values: gather(lay_out(values, cell_tokens, cells), cells), (tokens,))


def test_a_header_in_every_row_gets_the_sum_of_its_gradients():
    header = torch.tensor([[5.0, 6], [7, 8]], dtype=torch.float64).requires_grad_()
    tokens = torch.arange(6, dtype=torch.float64).view(3, 2).requires_grad_()
    # Two rows: the header and two tokens; the header, a token and padding.
    cell_tokens, cells = torch.tensor([0, 1, 2, 3, 0, 1, 4, 0]), torch.tensor([2, 3, 6])
    header_cells = torch.tensor([[0, 1], [4, 5]])
    weights = torch.randn(8, 2, dtype=torch.float64)
    weights[7] = 0

    def lay(header, own):
        whole = torch.cat([header, own]).detach()
        laid_out = lay_out(own, cell_tokens, cells, whole=whole, header=header, header_cells=header_cells)
        return (laid_out * weights).sum()

    assert torch.equal(lay_out(tokens, cell_tokens, cells, whole=torch.cat([header, tokens]))[5], header[1])
    assert torch.autograd.gradcheck(lay, (header, tokens))


def test_rows_stand_in_blocks_after_the_tokens_that_they_attend_to():
    """Against cells counted by hand: three rows in two blocks, after pasts of one and two tokens and a header."""
    lengths = Mirrored.of([1, 2, 2])
    spans = [RowSpan(slice(0, 2), slice(0, 3), 2, 2), RowSpan(slice(2, 3), slice(3, 5), 2, 1)]
    past = Past(4, Mirrored.of([1, 2, 1]), torch.tensor([1, 2, 1]))
    layout = lay_out_rows(lengths, spans, [Masks(None)] * 2, 1, past)
    assert [(block.rows, block.columns, block.keys) for block in layout.blocks] == [(2, 2, 5), (1, 2, 4)]
    header, padding = 0, 0
    assert layout.key_tokens.tolist() == [
        *(header, 1, padding, 4, padding), *(header, 2, 3, 5, 6), *(header, 1, 7, 8)
    ]  # fmt: skip
    assert layout.key_cells.tolist() == [3, 8, 9, 12, 13]
    queries = torch.randn(5, 4, 3)
    laid_out = lay_out(queries, layout.query_tokens, layout.query_cells)
    assert torch.equal(laid_out[2:4], queries[1:3])
    assert torch.equal(laid_out[4:], queries[3:])
    assert torch.equal(gather(laid_out, layout.output_cells), queries)


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["plain", "compiled"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_changes_are_undone(attention, backend):
    module = make_model("llama", attention=attention).get_decoder()
    embeds = make_rows()[0]
    plain = run_alone(module, embeds)
    decoder = PackedDecoder(module, checkpointing=True, compile_backend=backend)
    assert module.config._attn_implementation == ATTENTION
    assert decoder.eager == (attention == "eager")
    decoder.restore()
    assert module.config._attn_implementation == attention
    assert not any("forward" in vars(part) for part in module.modules())
    assert torch.equal(run_alone(module, embeds), plain)


def test_a_later_packed_decoder_takes_over_and_the_earlier_one_still_runs():
    module = make_model("llama", attention="eager").get_decoder()
    embeds, *layout = make_rows()
    plain = run_alone(module, embeds)
    earlier = PackedDecoder(module, checkpointing=True)
    later = PackedDecoder(module)
    assert later.eager
    prefix = run_prefix(earlier, torch.randn(45, 32, dtype=torch.float64), Mirrored.of([20, 10, 15]))
    rows = embeds.clone().requires_grad_()
    hidden = [run_tree(decoder, rows, *layout, prefix) for decoder in (earlier, later)]
    gradients = [torch.autograd.grad(output.sum(), rows)[0] for output in hidden]
    assert torch.equal(*hidden)
    assert torch.equal(*gradients)
    later.restore()
    assert torch.equal(run_alone(module, embeds), plain)


def test_a_copy_of_a_decoder_is_packed_by_itself():
    decoder = PackedDecoder(make_model("llama").get_decoder())
    embeds, *layout = make_rows()
    hidden = run_tree(decoder, embeds, *layout)
    copied = copy.deepcopy(decoder)
    assert copied.module is not decoder.module
    torch.nn.init.zeros_(decoder.module.layers[0].mlp.down_proj.weight)
    assert torch.equal(run_tree(copied, embeds, *layout), hidden)
    assert not torch.equal(run_tree(decoder, embeds, *layout), hidden)


def test_decoders_with_their_own_attention_code_are_refused():
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("stablelm", vocab_size=300, num_key_value_heads=4, **settings)
    with pytest.raises(ConfigError, match="a stablelm model has its own attention code"):
        PackedDecoder(AutoModelForCausalLM.from_config(config).get_decoder())
    config = AutoConfig.for_model("jamba", vocab_size=300, num_experts=1, **settings)
    with pytest.raises(ConfigError, match="a jamba model has layers of type linear_attention"):
        PackedDecoder(AutoModelForCausalLM.from_config(config).get_decoder())


def test_attention_that_the_kernel_for_sequences_does_not_support_is_refused():
    """In the layer too, in case a config has other names for what is checked before."""
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=300, num_key_value_heads=2, head_dim=264, **settings)
    decoder = PackedDecoder(AutoModelForCausalLM.from_config(config).get_decoder(), attention=Sequences())
    with pytest.raises(ConfigError, match=r"not support the attention of LlamaAttention; set llm\.attention=eager"):
        run_prefix(decoder, torch.randn(3, 32), Mirrored.of([3]))


def make_gpt2():
    """A decoder with another name for its layers and learned positions."""
    config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False).get_decoder()


@BLOCKS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_after_a_prefix_are_laid_out_again_in_the_backward_pass(architecture, blocks, monkeypatch):
    """They are not kept for it; gradients, the second time as well, are the same as if they were."""
    decoder = PackedDecoder(make_model(architecture).get_decoder(), attention=blocks)
    embeds, targets, positions, lengths = make_rows()
    prefix_lengths = Mirrored.of([20, 10, 15])
    prefix = run_prefix(decoder, torch.randn(45, 32, dtype=torch.float64), prefix_lengths)
    shifted = positions + prefix_lengths.tensor[lengths.list_rows()]
    storages = []

    def lay_out_and_note(*args, whole=None, **others):
        laid_out = lay_out(*args, whole=whole, **others)
        if whole is not None:
            storages.append(StorageWeakRef(laid_out.untyped_storage()))
        return laid_out

    def run():
        storages.clear()
        tokens = embeds.detach().requires_grad_()
        hidden = run_tree(decoder, tokens, targets, shifted, lengths, prefix)
        num_kept = sum(not storage.expired() for storage in storages)
        return num_kept, *(torch.autograd.grad(hidden.sum(), tokens, retain_graph=again)[0] for again in (True, False))

    monkeypatch.setattr(packed_attention, "lay_out", lay_out_and_note)
    num_kept, first, second = run()
    monkeypatch.setattr(packed_attention, "recompute_in_backward", lambda *sources: contextlib.nullcontext())
    num_kept_plainly, expected, _ = run()
    assert (num_kept, num_kept_plainly) == (0, len(storages))
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
