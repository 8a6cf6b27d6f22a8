"""LoRA dropout: keyed masks, independent of micro-batches, the same when recomputed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from collm_dist.data.prompts.micro_batches import plan_micro_batches
from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.errors import ConfigError
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.lora import add_lora
from collm_dist.llm.lora_dropout import DropoutMasks, DroppedLinear
from collm_dist.llm.packed.decoder import PackedDecoder
from collm_dist.random_keys import hash_integers, hash_tensor
from tests.parity.test_shared_context import STAGE1, collect_gradients, make_block, make_collator
from tests.tiny import make_model

CONTEXTS = [3, 1, 7, 4, 1, 2]
# float32, sums in another order; measured 4e-7 for losses and 2e-6 for gradients (relative).
TOLERANCE = 2e-5


def build(probability: float, tmp_path, architecture="llama", targets=("q_proj", "v_proj")):
    """Return a model with a large adapter, its collator, and a block."""
    tokenizer, collator = make_collator(STAGE1, tmp_path, stage2=False)
    backbone = make_model(architecture, dtype=torch.float32)
    add_lora(backbone, rank=2, alpha=4, dropout=probability, target_modules=targets, seed=1)
    torch.manual_seed(3)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model = CollmModel(backbone, resolve_answer_ids(tokenizer, " Yes", " No"), "yes_minus_no")
    return model.train(), collator, make_block(CONTEXTS)


def list_batches(collator, block, max_tokens, processes=1):
    for rank in range(processes):
        counts = collator.count_tokens(block)
        for piece in plan_micro_batches(block, counts, rank, processes, max_tokens):
            yield collator.collate(piece, block)


def work(model, batches, key=5):
    """Return scores by row id, and gradients of a sum over all rows."""
    scores, total = {}, {}
    for batch in batches:
        output = model(batch, key)
        real = batch.weights > 0
        scores |= dict(zip(batch.row_ids[real].tolist(), output[real].tolist(), strict=True))
        gradients = collect_gradients((output * batch.weights).square().sum(), model)
        total = gradients if not total else {name: total[name] + gradients[name] for name in gradients}
    return torch.tensor([scores[row] for row in sorted(scores)]), total


def assert_same(ours, plain):
    assert (ours[0] - plain[0]).abs().max() < TOLERANCE
    for name, value in plain[1].items():
        assert (ours[1][name] - value).norm() < TOLERANCE * value.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("max_tokens", "processes"), [(10**6, 1), (400, 1), (130, 1), (300, 2), (10**6, 3)])
def test_masks_do_not_depend_on_micro_batches_and_processes(tmp_path, max_tokens, processes, checkpointing):
    model, collator, block = build(0.3, tmp_path)
    # Each row alone: nothing is shared, and every context is computed again for each of its targets.
    alone = [collator.collate(block.take_targets(torch.tensor([row]).numpy()), block) for row in range(sum(CONTEXTS))]
    plain = work(model, alone)
    model.decoder = PackedDecoder(model.decoder.module, checkpointing=checkpointing)
    assert_same(work(model, list_batches(collator, block, max_tokens, processes)), plain)


def test_adapters_of_mlps_drop_too(tmp_path):
    """Including the last layer's MLP, which runs on fewer tokens if it has no adapter."""
    model, collator, block = build(0.3, tmp_path, targets="all")
    whole = work(model, list_batches(collator, block, 10**6))
    assert_same(work(model, list_batches(collator, block, 130)), whole)


def test_masks_depend_on_key_token_layer_and_mode(tmp_path):
    model, collator, block = build(0.3, tmp_path)
    batch = collator.collate(block, block)
    first = model(batch, 5)
    assert torch.equal(first, model(batch, 5))
    assert not torch.isclose(first, model(batch, 6)).any()
    masks = model._dropout_masks
    assert len(masks.windows) == 4  # two layers with two adapted matrices each
    windows = masks.windows
    assert windows.shape[1:] == (1, batch.num_tokens)
    assert len(windows.unique()) > 0.995 * windows.numel()  # 2,328 draws of 262,144 windows: about ten collide
    model.eval()
    plain = model(batch, 5)
    assert torch.equal(plain, model(batch, 6))
    assert not torch.isclose(first, plain).any()


def test_a_share_of_elements_is_dropped_and_the_rest_is_scaled(tmp_path):
    _, collator, block = build(0.3, tmp_path)
    batch = collator.collate(block, block)
    masks = DropoutMasks(0.3, 2)
    masks.draw(batch, 1)
    ones, same = torch.ones(1, batch.num_tokens, 576), nn.Linear(576, 576, bias=False)
    nn.init.eye_(same.weight)
    layer = DroppedLinear(same, masks, 1)
    dropped = layer(ones)
    share = (dropped == 0)[0].float()
    assert share.mean().item() == pytest.approx(0.3, abs=0.004)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (share.mean(0) - 0.3).abs().max() < 0.08  # standard error of a column: 0.019
    assert torch.equal(layer(ones[0]), dropped[0])  # as OPT's feed-forward layers see them
    with pytest.raises(ConfigError, match="sees tokens in shape"):
        layer(ones[:, 1:])


def test_gradients_equal_those_of_autograd_and_only_the_values_are_saved(tmp_path):
    """Against the same masks applied by hand, in float64; equal to the last digit or two (measured: 5e-16)."""
    _, collator, block = build(0.3, tmp_path)
    masks = DropoutMasks(0.3, 1)
    masks.draw(collator.collate(block, block), 1)
    tokens = masks.windows.shape[2]
    values = torch.randn(1, tokens, 32, dtype=torch.float64).requires_grad_()
    adapter = nn.Linear(32, 4, bias=False, dtype=torch.float64)
    weights = torch.randn(1, tokens, 4, dtype=torch.float64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: saved.append(value.shape) or value, lambda value: value
    ):
        ours = DroppedLinear(adapter, masks, 0)(values)
    assert saved == [values.shape, adapter.weight.shape, (1, tokens)]
    plain = adapter(masks.drop(values, masks.windows[0]))
    assert (ours - plain).norm() < 1e-14 * plain.norm()
    leaves = [values, adapter.weight]
    for gradient, expected in zip(
        torch.autograd.grad((ours * weights).sum(), leaves), torch.autograd.grad((plain * weights).sum(), leaves),
        strict=True,
    ):  # fmt: skip
        assert (gradient - expected).norm() < 1e-14 * expected.norm()


def test_bfloat16_values_stay_bfloat16(tmp_path):
    _, collator, block = build(0.3, tmp_path)
    batch = collator.collate(block, block)
    masks = DropoutMasks(0.05, 1)
    masks.draw(batch, 1)
    dropped = masks.drop(torch.ones(1, batch.num_tokens, 64, dtype=torch.bfloat16), masks.windows[0])
    assert dropped.dtype == torch.bfloat16
    assert dropped.unique().tolist() == [0, torch.tensor(1 / 0.95, dtype=torch.bfloat16).item()]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_compiled_layers_drop_the_same_from_few_graphs(tmp_path, checkpointing):
    torch._dynamo.reset()
    model, collator, block = build(0.3, tmp_path)
    batches = [batch for tokens in (10**6, 400, 300, 130) for batch in list_batches(collator, block, tokens)]
    plain = [work(model, [batch]) for batch in batches]
    torch._dynamo.utils.counters.clear()
    model.decoder = PackedDecoder(model.decoder.module, compile_backend="aot_eager", checkpointing=checkpointing)
    for batch, expected in zip(batches, plain, strict=True):
        assert_same(work(model, [batch]), expected)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


def test_the_tensor_hash_equals_the_numpy_hash():
    values = [0, 1, 2**40, -7]
    ours = hash_tensor(torch.tensor(values)).tolist()
    assert ours == [int(hash_integers(value).view("int64")) for value in values]
