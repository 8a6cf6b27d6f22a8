"""Decoders over packed tokens: what is shared, what is left out, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from collm_dist.errors import ConfigError
from collm_dist.llm.packed_attention import find_layers, pack, prepare_decoder, spread
from collm_dist.llm.shared_context import enable_activation_checkpointing, run_prefix, run_tree
from tests.tiny import ARCHITECTURES, make_model

# float64. Measured: up to 2e-15; transformers' norms and rotary embeddings round to float32 alike on both sides.
TOLERANCE = 1e-12
LENGTHS = (7, 3, 5)


def make_rows(width=32):
    """Rows of several lengths, right-padded: embeddings, branches, positions."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(len(LENGTHS), max(LENGTHS), width, generator=generator, dtype=torch.float64)
    columns = torch.arange(max(LENGTHS)).expand(len(LENGTHS), -1)
    branches = torch.where(columns < torch.tensor(LENGTHS)[:, None], 0, -1)
    return embeds, branches, columns


def run_alone(decoder, embeds, branches):
    """Each row by itself, as transformers runs it."""
    sizes = (branches >= 0).sum(1).tolist()
    return [
        decoder(inputs_embeds=row[None, :size]).last_hidden_state[0] for row, size in zip(embeds, sizes, strict=True)
    ]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2"])
def test_rows_of_several_lengths_equal_rows_alone_and_plain_passes_stay_as_they_were(architecture):
    decoder = make_gpt2() if architecture == "gpt2" else make_model(architecture).get_decoder()
    embeds, branches, positions = make_rows()
    plain = run_alone(decoder, embeds, branches)
    hidden = run_tree(decoder, embeds, branches, positions)
    assert (hidden[branches < 0] == 0).all()
    for row, expected in zip(hidden, plain, strict=True):
        assert (row[: len(expected)] - expected).abs().max() < TOLERANCE
    for again, expected in zip(run_alone(decoder, embeds, branches), plain, strict=True):
        assert (again - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_header_is_shared_with_its_gradients(architecture, checkpointing):
    """The first tokens of all rows at once, against each row with tokens of its own."""
    decoder = make_model(architecture).get_decoder()
    rest, branches, _ = make_rows()
    header = torch.randn(10, 32, dtype=torch.float64).requires_grad_()  # longer than the window that some models have
    whole = torch.cat([header.expand(len(rest), -1, -1), rest], dim=1)
    hidden = [
        row[len(header) :]
        for row in run_alone(decoder, whole, torch.cat([torch.zeros(len(rest), 10, dtype=torch.long), branches], dim=1))
    ]
    wanted = sum(row.square().sum() for row in hidden)
    (expected,) = torch.autograd.grad(wanted, header)
    if checkpointing:
        enable_activation_checkpointing(decoder)
    positions = 10 + torch.arange(rest.shape[1]).expand(len(rest), -1)
    ours = run_tree(decoder, rest, branches, positions, header=header)
    for row, alone in zip(ours, hidden, strict=True):
        assert (row[: len(alone)] - alone).abs().max() < TOLERANCE
    (found,) = torch.autograd.grad(ours.square().sum(), header)
    # Norms round to float32 inside, and sums come in another order. Measured: up to 4e-8.
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_network_runs_on_what_is_needed(architecture):
    decoder = make_model(architecture).get_decoder()
    embeds, branches, positions = make_rows()
    rows = embeds.clone().requires_grad_()
    hidden = run_tree(decoder, rows, branches, positions)
    needed = torch.tensor([6, 9, 18])  # the last token of each row
    (expected,) = torch.autograd.grad(hidden.flatten(0, 1)[needed].square().sum(), rows)
    seen = []
    network = find_layers(decoder)[-1].mlp
    handle = next(network.children()).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    part = run_tree(decoder, rows, branches, positions, needed=needed)
    handle.remove()
    assert seen == [3]
    assert (part - hidden).flatten(0, 1)[needed].abs().max() < TOLERANCE
    (found,) = torch.autograd.grad(part.flatten(0, 1)[needed].square().sum(), rows)
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prefix_goes_on_after_its_header(architecture):
    """Header and prefixes one after the other, and tree rows over both, against each row with tokens of its own."""
    decoder = make_model(architecture).get_decoder()
    embeds, branches, positions = make_rows()
    # Longer than the window that some models have.
    lengths, start = torch.tensor(LENGTHS), torch.randn(10, 32, dtype=torch.float64)
    header = run_prefix(decoder, start[None], torch.tensor([10]))
    together = run_prefix(decoder, embeds, lengths, header=header)
    alone = run_prefix(decoder, torch.cat([start.expand(3, -1, -1), embeds], dim=1), 10 + lengths)
    assert together.lengths.tolist() == list(LENGTHS)
    parts = zip(header.layers, together.layers, alone.layers, strict=True)
    for of_header, of_rows, whole in parts:
        for first, second, expected in zip(of_header, of_rows, whole, strict=True):
            for row, length in enumerate(LENGTHS):
                found = torch.cat([first[0], second[row, :, :length]], dim=1)
                assert (found - expected[row, :, : 10 + length]).abs().max() < TOLERANCE
    for rows in (None, torch.tensor([2, 0, 2])):
        taken = slice(None) if rows is None else rows
        shifted = positions + 10 + lengths[taken, None]
        found, expected = (
            run_tree(decoder, embeds, branches, shifted, dataclasses.replace(one, rows=rows))
            for one in (together, alone)
        )
        assert (found - expected).abs().max() < TOLERANCE


def test_what_is_packed_comes_back_with_zeros_for_padding_and_its_gradients():
    places = torch.tensor([0, 1, 3, 4, 5])
    rows = torch.arange(12, dtype=torch.float64).view(2, 3, 2).requires_grad_()
    again = spread(pack(rows, places), places, 2, 3)
    assert (again[0, 2] == 0).all()
    assert torch.equal(again.flatten(0, 1)[places], rows.flatten(0, 1)[places])
    assert torch.autograd.gradcheck(lambda one: spread(pack(one, places), places, 2, 3), (rows,))


def test_attention_in_a_way_of_its_own_is_refused():
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("stablelm", vocab_size=300, num_key_value_heads=4, **settings)
    with pytest.raises(ConfigError, match="a stablelm model computes attention in a way of its own"):
        prepare_decoder(AutoModelForCausalLM.from_config(config).get_decoder())
    config = AutoConfig.for_model("jamba", vocab_size=300, num_experts=1, **settings)
    with pytest.raises(ConfigError, match="a jamba model has layers of type linear_attention"):
        prepare_decoder(AutoModelForCausalLM.from_config(config).get_decoder())


def make_gpt2():
    """A decoder that calls its layers otherwise and learns its positions."""
    config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False).get_decoder()
