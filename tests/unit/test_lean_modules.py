"""Memory-saving gated MLPs and RMS norms: the same outputs and gradients, with fewer saved activations."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from collm_dist.llm.lora import add_lora
from collm_dist.llm.packed.decoder import PackedDecoder
from collm_dist.llm.packed.lean_modules import GATED_MLPS, RMS_NORMS, fuse_rms_norm, run_gated_mlp, run_rms_norm
from tests.tiny import ARCHITECTURES, make_model

# float64; the activation is computed twice by the same code. Measured: 0.
MLP_TOLERANCE = 1e-14
# float32, sums in another order. Measured: 6e-7.
NORM_TOLERANCE = 5e-6
NORMS_PER_LAYER = {"llama": 2, "qwen2": 2, "qwen3": 4, "mistral": 2, "gemma3_text": 0, "gpt_neox": 0}


def parse_forward(module_class) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(module_class.forward)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.arg):  # annotations may differ
            node.returns = node.annotation = None
    return ast.dump(tree)


@pytest.mark.parametrize("module_class", GATED_MLPS + RMS_NORMS, ids=lambda module_class: module_class.__name__)
def test_named_classes_have_the_forward_source_of_llama(module_class):
    known = LlamaMLP if module_class in GATED_MLPS else LlamaRMSNorm
    assert parse_forward(module_class) == parse_forward(known)


def is_lean(module, function) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func is function


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modules_are_replaced_and_restored(architecture):
    module = make_model(architecture).get_decoder()
    decoder = PackedDecoder(module)
    norms = NORMS_PER_LAYER[architecture]
    assert sum(is_lean(part, run_rms_norm) for part in module.modules()) == 2 * norms + (norms > 0)  # and the final one
    # The last layer's MLP runs on the needed tokens only, by a function around the lean one.
    assert is_lean(module.layers[0].mlp, run_gated_mlp) == (architecture != "gpt_neox")
    assert all("forward" in vars(layer) for layer in module.layers)
    decoder.restore()
    assert not any("forward" in vars(part) for part in module.modules())
    assert module.config._attn_implementation == "sdpa"


def run(mlp, hidden):
    """Return the output, the gradients of the input and of trainable weights, and the number of elements saved."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in mlp.parameters()}
    saved = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = hidden.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = mlp(hidden)
    num_saved = sum(tensor.numel() for tensor in saved.values())
    trainable = [hidden, *(parameter for parameter in mlp.parameters() if parameter.requires_grad)]
    return output.detach(), torch.autograd.grad(output.square().sum(), trainable), num_saved


@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gpt_neox"])
def test_gated_mlps_compute_the_same_and_save_less(architecture, lora):
    backbone = make_model(architecture)
    if lora:
        add_lora(backbone, rank=2, alpha=4, dropout=0.0, target_modules=("gate_proj", "down_proj"), seed=0)
        backbone.double()
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    mlp = backbone.get_decoder().layers[0].mlp
    assert type(mlp) in GATED_MLPS
    hidden = torch.randn(1, 40, 32, dtype=torch.float64)
    output, gradients, num_saved = run(mlp, hidden)
    lean = copy.deepcopy(mlp)
    lean.forward = functools.partial(run_gated_mlp, lean)
    lean_output, lean_gradients, lean_num_saved = run(lean, hidden)
    assert (lean_output - output).abs().max() <= MLP_TOLERANCE
    for ours, expected in zip(lean_gradients, gradients, strict=True):
        assert (ours - expected).abs().max() <= MLP_TOLERANCE
    if not lora:
        assert lean_num_saved <= 2 / 3 * num_saved + 1


def test_modules_with_other_code_are_left_alone():
    class Capped(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=2) * self.up_proj(x))

    module = make_model("llama").get_decoder()
    module.layers[0].mlp.__class__ = Capped
    module.layers[0].mlp.act_fn = ACT2FN["silu"]
    changed = module.layers[0].input_layernorm
    changed.forward = identity = lambda hidden: hidden
    PackedDecoder(module)
    assert "forward" not in vars(module.layers[0].mlp)
    assert changed.forward is identity


@pytest.mark.parametrize("width", [8, 32, 576])
def test_the_norm_kernel_computes_the_same(width):
    torch.manual_seed(0)
    norm = make_model("llama", dtype=torch.float32).get_decoder().norm
    norm.weight = torch.nn.Parameter(torch.randn(width))
    hidden = torch.randn(3, 7, width, requires_grad=True)
    expected = norm(hidden)
    output = fuse_rms_norm(norm, hidden)
    assert (output - expected).abs().max() < NORM_TOLERANCE
    weights = torch.randn_like(expected)
    for ours, plain in zip(
        torch.autograd.grad((output * weights).sum(), [hidden, norm.weight]),
        torch.autograd.grad((expected * weights).sum(), [hidden, norm.weight]),
        strict=True,
    ):
        assert (ours - plain).abs().max() < NORM_TOLERANCE * plain.abs().max()


def test_without_a_gpu_a_norm_runs_its_own_code():
    norm = make_model("llama", dtype=torch.float32).get_decoder().norm
    hidden = torch.randn(2, 5, 32)
    assert torch.equal(run_rms_norm(norm, hidden), norm(hidden))
