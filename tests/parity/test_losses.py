"""Losses that compare targets, against a plain implementation: padded rows, and a loop over pairs and lists."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from collm_dist.data.prompts.micro_batches import count_longest, plan_micro_batches
from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.data.prompts.target_groups import find_groups
from collm_dist.data.samples.pair_features import PAIR_FEATURES
from collm_dist.llm.anchored_score import AnchoredScore
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.lora import add_lora
from collm_dist.llm.slot_mapping import SlotMapper
from collm_dist.tuning.losses import LossWeights, StepLoss
from collm_dist.tuning.step_batches import StepBatch
from tests.parity.test_shared_context import (
    STAGE1,
    STAGE2,
    TEXTS,
    Tables,
    _exact_head,  # noqa: F401 - used by pytest
    assert_gradients_close,
    collect_gradients,
    make_block,
    make_collator,
)
from tests.reference.padded_rows import score_plainly, spell_prompts
from tests.tiny import make_model

# float64; measured: 2e-16 (relative).
TOLERANCE = 1e-12
WEIGHTS = LossWeights(pairwise=0.7, listwise=0.4)
SIZES = [1, 3, 40, 2, 9]
NEGATIVES = 3


def make_lists():
    """Return a block whose contexts consist of positives with three sampled negatives each, in the order of shards.

    A cut between steps took some rows: a list without its positive, a positive without negatives.
    """
    block = make_block([4, 24, 8, 12, 4], seed=3)
    group, label = block.row_id.copy(), np.ones(block.num_targets, dtype=np.int64)
    for start, stop in zip(block.target_offsets[:-1], block.target_offsets[1:], strict=True):
        positives = (stop - start) // (1 + NEGATIVES)
        negatives = np.arange(start + positives, stop)
        label[negatives] = 0
        group[negatives] = block.row_id[start + np.arange(len(negatives)) // NEGATIVES]
    block = dataclasses.replace(block, group_id=group, label=label)
    return block.take_targets(np.setdiff1d(np.arange(block.num_targets), [0, 49, 50, 51]))


def make_ratings():
    """Return a block of rated targets, each a list of its own."""
    block = make_block(SIZES, seed=1)
    return dataclasses.replace(block, group_id=block.row_id)


def list_plain_groups(block):
    """Return the targets of each group: runs of whole lists of a context, at most 16 targets."""
    groups = []
    for start, stop in zip(block.target_offsets[:-1], block.target_offsets[1:], strict=True):
        lists = defaultdict(list)
        for target in range(start, stop):
            lists[int(block.group_id[target])].append(target)
        groups.append([])
        for members in lists.values():
            if groups[-1] and len(groups[-1]) + len(members) > 16:
                groups.append([])
            groups[-1] += members
    return groups


def compute_plain_terms(scores, block):
    """Return the three terms from a loop over targets, pairs and lists."""
    like = [bool(label) for label in block.label]
    bce = [torch.nn.functional.softplus(-score if is_like else score)
           for score, is_like in zip(scores, like, strict=True)]  # fmt: skip
    pairs = [
        torch.log1p(torch.exp(scores[dislike] - scores[liked]))
        for group in list_plain_groups(block)
        for liked in group
        for dislike in group
        if like[liked] and not like[dislike]
    ]
    lists = defaultdict(list)
    for target, key in enumerate(block.group_id.tolist()):
        lists[key].append(target)
    listwise = []
    for members in lists.values():
        positives = [target for target in members if like[target]]
        if positives and len(members) > 1:
            listwise.append(-torch.log_softmax(scores[members], 0)[members.index(positives[0])])
    return [sum(terms) / len(terms) if terms else scores.sum() * 0 for terms in (bce, pairs, listwise)]


def build(stage, tmp_path):
    """Return a model, its collator, and a function that scores a block's targets one padded row each."""
    is_stage2 = stage == "stage2"
    template = STAGE2 if is_stage2 else STAGE1
    tokenizer, collator = make_collator(template, tmp_path, stage2=is_stage2)
    backbone, answers = make_model("llama"), resolve_answer_ids(tokenizer, " Yes", " No")
    if not is_stage2:
        add_lora(backbone, rank=2, alpha=4, dropout=0.0, target_modules=("q_proj", "v_proj"), seed=1)
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(3))
        backbone.double()
    tables = Tables()
    mapper = None
    if is_stage2:
        mapper = SlotMapper(
            cf_dim=6,
            pair_dim=len(PAIR_FEATURES),
            llm_dim=32,
            hidden_multiple=3,
            tokens_per_slot=1,
            out_scale=0.15,
            seed=2,
        ).double()
    model = CollmModel(backbone, answers, "yes_minus_no", mapper, tables if is_stage2 else None)

    def score(block):
        samples = spell_prompts(block, template, TEXTS, tokenizer, history_length=4)
        features = collator.collate(block, block).pair_features.double()
        return score_plainly(
            backbone, samples, block, answers, slot_mapper=mapper, cf_model=tables, pair_features=features
        )

    return model.train(), collator, score


def compute_shared(model, collator, block, limit, processes):
    """Return terms and gradients summed over the micro-batches of all processes, and the number of micro-batches."""
    groups, counts = find_groups(block), collator.count_tokens(block)
    max_tokens = 10**6 if limit == "none" else count_longest(block, counts, groups)
    terms, gradients, batches = torch.zeros(4), {}, 0
    for rank in range(processes):
        pieces = plan_micro_batches(block, counts, rank, processes, max_tokens, groups)
        loss = StepLoss(WEIGHTS, StepBatch(block, [], groups), torch.device("cpu"))
        for piece in pieces:
            batch = collator.collate(piece, block, None, groups)
            batch = dataclasses.replace(batch, pair_features=batch.pair_features.double())
            found = collect_gradients(loss.add(model(batch), batch, batch), model)
            gradients = found if not gradients else {name: gradients[name] + found[name] for name in found}
        terms = terms + loss.list_values()
        batches += len(pieces)
    return terms, gradients, batches


@pytest.mark.parametrize(("limit", "processes"), [("none", 1), ("longest", 1), ("longest", 2), ("none", 3)])
@pytest.mark.parametrize("make", [make_ratings, make_lists])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_loss_and_gradients_equal_those_of_single_rows(stage, make, limit, processes, tmp_path):
    model, collator, score = build(stage, tmp_path)
    block = make()
    plain = compute_plain_terms(score(block), block)
    total = plain[0] + 0.7 * plain[1] + 0.4 * plain[2]
    expected = torch.stack([total, *plain]).tolist()
    terms, gradients, batches = compute_shared(model, collator, block, limit, processes)
    assert terms.tolist() == pytest.approx(expected, rel=1e-6)  # summed in float32
    assert expected[2] > 0
    assert (expected[3] > 0) == (make is make_lists)
    assert (batches > 1) == ((limit, processes) != ("none", 1))
    assert_gradients_close(gradients, collect_gradients(total, model))


def test_the_terms_of_scores_are_exact():
    """Without a model, in float64."""
    for block in (make_ratings(), make_lists()):
        groups = find_groups(block)
        scores = torch.randn(block.num_targets, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        scores.requires_grad_()
        batch = _Batch(block, groups)
        ours = StepLoss(WEIGHTS, StepBatch(block, [], groups), torch.device("cpu")).add(scores, batch, batch)
        bce, pairwise, listwise = compute_plain_terms(scores, block)
        plain = bce + 0.7 * pairwise + 0.4 * listwise
        assert math.isclose(ours.item(), plain.item(), rel_tol=TOLERANCE)
        (gradient,), (expected,) = torch.autograd.grad(ours, scores), torch.autograd.grad(plain, scores)
        assert (gradient - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("has_zero", [True, False], ids=["answers", "titles"])
def test_the_language_models_own_loss_is_that_of_its_scores(has_zero):
    """Anchored and own scores of one model, in float64: the loss is the sum of both losses, gradients included.

    Without a zero, as the likelihood of a title, the own scores are only compared.
    """
    weights = dataclasses.replace(WEIGHTS, llm=0.3, llm_has_zero=has_zero)
    block = make_lists()
    groups, step_batch = find_groups(block), StepBatch(block, [], find_groups(block))
    scores = torch.randn(2, block.num_targets, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scores.requires_grad_()
    batch = _Batch(block, groups)
    step_loss = StepLoss(weights, step_batch, torch.device("cpu"))
    ours = step_loss.add(scores, batch, batch)
    plain = [compute_plain_terms(row, block) for row in scores]
    totals = [bce + 0.7 * pairwise + 0.4 * listwise for bce, pairwise, listwise in plain]
    totals[1] = totals[1] if has_zero else totals[1] - plain[1][0]
    assert math.isclose(ours.item(), (totals[0] + 0.3 * totals[1]).item(), rel_tol=TOLERANCE)
    expected = torch.autograd.grad(totals[0] + 0.3 * totals[1], scores)[0]
    assert (torch.autograd.grad(ours, scores)[0] - expected).abs().max() < TOLERANCE
    assert step_loss.terms.tolist() == pytest.approx([term.item() for term in plain[0]], rel=1e-6)


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_the_model_returns_its_own_scores_beside_the_anchored_ones(gain, tmp_path):
    model, collator, _ = build("stage1", tmp_path)
    block = make_ratings()
    batch = collator.collate(block, block)
    alone = model(batch)
    model.anchored_score = AnchoredScore()
    model.anchored_score.gain.data.fill_(gain)
    batch = dataclasses.replace(batch, anchors=torch.randn(len(batch.labels)))
    anchored, own = model(batch, with_llm_scores=True)
    assert torch.equal(own, alone.float())
    assert torch.equal(anchored, model(batch))
    (gradient,) = torch.autograd.grad(own.sum(), [model.backbone.get_parameter(find_lora(model.backbone))])
    assert gradient.abs().max() > 0


def find_lora(backbone):
    return next(name for name, _ in backbone.named_parameters() if "lora_B" in name)


class _Batch:
    """The fields of a batch that the loss reads."""

    def __init__(self, block, groups):
        self.labels, self.weights = torch.from_numpy(block.label).double(), torch.ones(block.num_targets).double()
        self.lists, self.groups = torch.from_numpy(block.group_id), torch.from_numpy(groups)
