"""Norms by one kernel: the same numbers and gradients, of every backbone whose norms are Llama's."""

from __future__ import annotations

import pytest
import torch

from collm_dist.llm.packed.decoder import prepare_decoder, restore_modules
from collm_dist.llm.packed.fused_norm import fuse_norm, is_fused, normalize
from tests.tiny import ARCHITECTURES, make_model

# float32, sums in another order. Measured: 6e-7.
TOLERANCE = 5e-6
NORMS_OF_A_LAYER = {"llama": 2, "qwen2": 2, "qwen3": 4, "mistral": 2, "gemma3_text": 0, "gpt_neox": 0}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_are_found_and_given_back(architecture):
    decoder = make_model(architecture).get_decoder()
    prepare_decoder(decoder)
    expected = NORMS_OF_A_LAYER[architecture]
    assert sum(map(is_fused, decoder.modules())) == 2 * expected + (expected > 0)  # and the last one
    restore_modules(decoder)
    assert not any(map(is_fused, decoder.modules()))


@pytest.mark.parametrize("width", [8, 32, 576])
def test_the_kernel_computes_what_the_module_does(width):
    torch.manual_seed(0)
    norm = make_model("llama", dtype=torch.float32).get_decoder().norm
    norm.weight = torch.nn.Parameter(torch.randn(width))
    hidden = torch.randn(3, 7, width, requires_grad=True)
    theirs = norm(hidden)
    ours = normalize(norm, hidden)
    assert (ours - theirs).abs().max() < TOLERANCE
    weights = torch.randn_like(theirs)
    for mine, plain in zip(
        torch.autograd.grad((ours * weights).sum(), [hidden, norm.weight]),
        torch.autograd.grad((theirs * weights).sum(), [hidden, norm.weight]),
        strict=True,
    ):
        assert (mine - plain).abs().max() < TOLERANCE * plain.abs().max()


def test_off_a_gpu_the_module_runs_as_it_is():
    norm = make_model("llama", dtype=torch.float32).get_decoder().norm
    hidden = torch.randn(2, 5, 32)
    plain = norm(hidden)
    fuse_norm(norm)
    assert torch.equal(norm(hidden), plain)
