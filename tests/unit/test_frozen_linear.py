"""Products with frozen weights by the other library: the same numbers and gradients, where it may be used."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from collm_dist.heap import KERNEL_CACHES
from collm_dist.llm.packed import frozen_linear
from collm_dist.llm.packed.decoder import prepare_decoder, restore_modules
from collm_dist.llm.packed.frozen_linear import hasten_products, is_hastened, multiply
from tests.tiny import ARCHITECTURES, make_model

# float32 beside float64, of values about 1. Measured: up to 7.2e-7 for outputs, 1.2e-6 for gradients.
TOLERANCE = 1e-5

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def allowed(monkeypatch):
    """A processor on which it is faster, in a process that keeps few kernels."""
    monkeypatch.setattr(frozen_linear, "_is_faster", lambda: True)
    monkeypatch.setattr(frozen_linear, "LEAST_NUMBERS", 0)
    for name, value in KERNEL_CACHES.items():
        monkeypatch.setenv(name, value)


def make_linear(*, bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 80, bias=bias).requires_grad_(False)


@needs_onednn
@pytest.mark.parametrize("rows", [(1,), (7,), (3, 50)])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_the_modules(allowed, bias, rows):
    module = make_linear(bias=bias)
    hidden, weights = torch.randn(*rows, 48), torch.randn(*rows, 80)
    exact = hidden.double().requires_grad_()
    expected = linear(exact, module.weight.double(), None if module.bias is None else module.bias.double())
    (slope,) = torch.autograd.grad((expected * weights.double()).sum(), exact)
    hasten_products([module])
    assert is_hastened(module)
    ours = hidden.requires_grad_()
    found = module(ours)
    assert (found - expected).abs().max() < TOLERANCE
    (gradient,) = torch.autograd.grad((found * weights).sum(), ours)
    assert (gradient - slope).abs().max() < TOLERANCE
    with torch.no_grad():
        assert torch.equal(module(ours), found)


@needs_onednn
def test_strides_do_not_matter():
    module, hidden = make_linear(bias=False), torch.randn(48, 6).t()
    assert (multiply(hidden, module.weight) - hidden @ module.weight.t()).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stay_with_the_module(allowed, dtype):
    module = make_linear(bias=True).to(dtype)
    hidden = torch.randn(5, 48, dtype=dtype)
    plain = module(hidden)
    hasten_products([module])
    assert torch.equal(module(hidden), plain)


def test_weights_that_learn_have_their_gradients(allowed):
    module = make_linear(bias=True).requires_grad_(True)
    hasten_products([module])
    module(torch.randn(5, 48)).sum().backward()
    assert module.weight.grad is not None
    assert module.bias.grad is not None


def test_modules_with_code_of_their_own_are_left_alone(allowed):
    class Other(nn.Linear):
        pass

    changed = make_linear(bias=False)
    changed.forward = lambda hidden: hidden
    others = [Other(48, 80), changed]
    hasten_products(others)
    assert not any(map(is_hastened, others))


def test_it_needs_bounded_caches_and_layers_enough(allowed, monkeypatch):
    alike, alone = [nn.Linear(48, 80) for _ in range(3)], nn.Linear(48, 81)
    monkeypatch.setattr(frozen_linear, "LEAST_NUMBERS", 3 * 48 * 80)
    with monkeypatch.context() as without:
        without.delenv(next(iter(KERNEL_CACHES)))
        hasten_products(alike)
        assert not any(map(is_hastened, alike))
    hasten_products([*alike, alone])
    assert all(map(is_hastened, alike))
    assert not is_hastened(alone)


@needs_onednn
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoders_are_changed_and_given_back(allowed, architecture):
    decoder = make_model(architecture, dtype=torch.float32).get_decoder().requires_grad_(False)
    embeds = torch.randn(2, 9, 32)
    plain = decoder(inputs_embeds=embeds).last_hidden_state
    prepare_decoder(decoder)
    modules = [one for one in decoder.modules() if type(one) is nn.Linear]
    assert modules
    assert all(map(is_hastened, modules))
    assert (decoder(inputs_embeds=embeds).last_hidden_state - plain).abs().max() < TOLERANCE
    restore_modules(decoder)
    assert not any(map(is_hastened, modules))
