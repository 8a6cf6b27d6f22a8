"""Gated networks that keep less: the same numbers and gradients, of which less is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from collm_dist.llm.lora import add_lora
from collm_dist.llm.packed.decoder import find_layers, prepare_decoder, restore_modules
from collm_dist.llm.packed.gated_mlp import is_gated, slim_down
from tests.tiny import ARCHITECTURES, make_model

# float64; the activation is computed twice, by the same code. Measured: 0.
TOLERANCE = 1e-14


def run(network, hidden):
    """Return the output, the gradients of the input and of what trains, and how many numbers were kept."""
    own = {one.untyped_storage().data_ptr() for one in network.parameters()}
    kept = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = hidden.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = network(hidden)
    numbers = sum(one.numel() for one in kept.values())
    trained = [hidden, *(one for one in network.parameters() if one.requires_grad)]
    return output.detach(), torch.autograd.grad(output.square().sum(), trained), numbers


@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_with_less_kept(architecture, lora):
    backbone = make_model(architecture)
    if lora:
        modules = ["dense_h_to_4h"] if architecture == "gpt_neox" else ["gate_proj", "down_proj"]
        backbone = add_lora(backbone, rank=2, alpha=4, dropout=0.0, target_modules=modules, seed=0).double()
        for name, one in backbone.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(one)
    network = find_layers(backbone.get_decoder() if not lora else backbone.base_model.model.get_decoder())[0].mlp
    hidden = torch.randn(1, 40, 32, dtype=torch.float64)
    output, gradients, kept = run(network, hidden)
    slimmer = copy.deepcopy(network)
    slim_down(slimmer)
    assert is_gated(network) == (architecture != "gpt_neox")
    found, found_gradients, found_kept = run(slimmer, hidden)
    assert (found - output).abs().max() <= TOLERANCE
    for ours, theirs in zip(found_gradients, gradients, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE
    if not is_gated(network):
        assert found_kept == kept
    elif not lora:
        assert found_kept <= 2 / 3 * kept + 1


def test_a_decoder_gets_slim_networks_and_loses_them_again():
    decoder = make_model("llama").get_decoder()
    prepare_decoder(decoder)
    networks = [layer.mlp for layer in find_layers(decoder)]
    assert all("forward" in vars(one) for one in networks)
    restore_modules(decoder)
    assert not any("forward" in vars(one) for one in networks)


def test_a_network_of_another_kind_is_left_alone():
    class Capped(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=2) * self.up_proj(x))

    network = Capped.__new__(Capped)
    torch.nn.Module.__init__(network)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(network, name, torch.nn.Linear(4, 4))
    network.act_fn = ACT2FN["silu"]
    slim_down(network)
    assert "forward" not in vars(network)
