"""Title likelihoods against plain rows: scores, gradients, and values kept between passes."""

import dataclasses

import numpy as np
import pytest
import torch

from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.data.samples.pair_features import PAIR_FEATURES
from collm_dist.llm import title_likelihood
from collm_dist.llm.anchored_score import AnchoredScore
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.lora import add_lora
from collm_dist.llm.lora_dropout import DroppedLinear
from collm_dist.llm.packed.decoder import PackedDecoder, find_decoder
from collm_dist.llm.slot_mapping import SlotMapper
from collm_dist.llm.title_likelihood import TITLE_SCALE, TitlePriors
from tests.parity.test_shared_context import (
    ATTENTION,
    GRADIENT_TOLERANCE,
    STAGE1,
    STAGE2,
    TEXTS,
    Tables,
    collect_gradients,
    compute_loss,
    make_adapted_model,
    make_block,
    make_collator,
)
from tests.reference.padded_rows import spell_prompts
from tests.tiny import ARCHITECTURES, make_model

WITHOUT_HEADER = "<ItemTitleList>: <TargetItemTitle>? Answer:"
# Measured: at most 3e-6, since sums over a title are float32.
SCORE_TOLERANCE = 1e-5


class TablesOfKnown(Tables):
    """Tables with the zero vector for unknown users."""

    def user_vectors(self, user_idx, history, target, timestamp):
        return self.users[user_idx] * (user_idx >= 0)[:, None]


def make_scorer(template, tmp_path, architecture="llama", attention="blocks", **parts):
    """Return a model of a stage's prompts, and its collator."""
    stage2 = "<UserID>" in template
    tokenizer, collator = make_collator(template, tmp_path, stage2=stage2, scores_titles=True)
    backbone = parts.pop("backbone", None) or make_model(architecture)
    if stage2:
        sizes = {"cf_dim": 6, "pair_dim": len(PAIR_FEATURES), "llm_dim": 32, "hidden_multiple": 3}
        parts["slot_mapper"] = SlotMapper(**sizes, tokens_per_slot=1, out_scale=0.15, seed=2).double()
        parts["cf_model"] = TablesOfKnown()
    model = CollmModel(
        backbone,
        resolve_answer_ids(tokenizer, " Yes", " No"),
        "title",
        decoder=PackedDecoder(find_decoder(backbone), attention=ATTENTION[attention]),
        title_priors=TitlePriors(lambda items: widen(collator.lay_out_without_history(items))),
        **parts,
    )
    return model, collator, tokenizer


def widen(batch):
    return dataclasses.replace(batch, pair_features=batch.pair_features.double())


def score_plainly(model, tokenizer, template, block):
    """Return the scores of a block from one whole row a prompt, spelled out to the end of the title."""
    template = template[: template.index("<TargetItemTitle>")] + "<TargetItemTitle>"

    def list_log_likelihoods(block, user_vectors):
        samples = spell_prompts(block, template, TEXTS, tokenizer, history_length=4)
        found = []
        for sample, item, context in zip(samples, block.item_idx.tolist(), block.target_contexts, strict=True):
            embeds = model.backbone.get_input_embeddings()(torch.tensor(sample.ids))
            for column, _, _ in sample.slots:
                embeds = embeds.clone()
                embeds[column] = model.slot_mapper.cf(user_vectors[[context]])[0, 0]
            logs = model.backbone(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)
            title = len(tokenizer(f'"{TEXTS[item]}"', add_special_tokens=False, split_special_tokens=True)["input_ids"])
            predicted = torch.tensor(sample.ids[len(sample.ids) - title + 1 :], dtype=torch.int64)
            found.append(logs[len(sample.ids) - title : -1].gather(1, predicted[:, None]).sum())
        return torch.stack(found)

    vectors = None if model.cf_model is None else model.cf_model.users[block.user_idx]
    unknown = dataclasses.replace(
        block, history_offsets=np.zeros_like(block.history_offsets), history_items=np.zeros(0, dtype=np.int64)
    )
    priors = list_log_likelihoods(unknown, None if vectors is None else torch.zeros_like(vectors))
    return TITLE_SCALE * (list_log_likelihoods(block, vectors) - priors)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(title_likelihood, "_CHUNK", 7)


@pytest.mark.parametrize("template", [STAGE1, WITHOUT_HEADER], ids=["stage1", "without-header"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_and_gradients_of_the_adapter(architecture, attention, template, tmp_path):
    backbone = make_adapted_model(architecture)
    model, collator, tokenizer = make_scorer(template, tmp_path, attention=attention, backbone=backbone)
    block = make_block([1, 3, 9, 2])
    batch = collator.collate(block, block)
    plain = score_plainly(model, tokenizer, template, block)
    gradients = collect_gradients(compute_loss(plain, batch), backbone)
    model.train()
    scores = model(batch)
    assert (scores - plain).abs().max() < SCORE_TOLERANCE
    ours = collect_gradients(compute_loss(scores, batch), backbone)
    for name, value in gradients.items():
        assert (ours[name] - value).norm() <= 10 * GRADIENT_TOLERANCE * value.norm(), name


def test_scores_and_gradients_of_the_mapping(tmp_path):
    """Only what stands before the title counts: the user's slot, not those of the item and the pair."""
    model, collator, tokenizer = make_scorer(STAGE2, tmp_path, detach_cf=False)
    block = make_block([2, 1, 7, 4, 1])
    batch = widen(collator.collate(block, block))
    plain = score_plainly(model, tokenizer, STAGE2, block)
    model.train()
    scores = model(batch)
    assert (scores - plain).abs().max() < SCORE_TOLERANCE
    trained = {"mapping": model.slot_mapper.cf, "users": model.cf_model}
    for name, module in trained.items():
        weights = [weight for weight in module.parameters() if weight is not model.cf_model.items]
        ours, theirs = (torch.autograd.grad(loss.sum(), weights, retain_graph=True) for loss in (scores, plain))
        for ours_each, theirs_each in zip(ours, theirs, strict=True):
            assert (ours_each - theirs_each).norm() <= 10 * GRADIENT_TOLERANCE * theirs_each.norm(), name


def test_scores_do_not_depend_on_the_division_into_batches(tmp_path):
    model, collator, _ = make_scorer(STAGE1, tmp_path)
    block = make_block([6, 5])
    whole = model.eval()(collator.collate(block, block))
    scoring = collator.for_scoring()
    parts = [block.take_targets(np.arange(first, last)) for first, last in ((0, 4), (4, 8), (8, 11))]
    divided = torch.cat([model(scoring.collate(part, part)) for part in parts])
    assert (divided - whole).abs().max() < SCORE_TOLERANCE
    assert whole.std() > 0.01


def test_likelihoods_without_a_history_are_kept_while_weights_cannot_change(tmp_path):
    model, collator, _ = make_scorer(STAGE1, tmp_path)
    lay_out, asked = model._title_priors._lay_out, []
    model._title_priors._lay_out = lambda items: asked.append(items.tolist()) or lay_out(items)
    block = make_block([6, 5])
    few = block.take_targets(np.arange(3))
    model.eval()
    first = model(collator.collate(few, few))
    model(collator.collate(block, block))
    assert sorted(asked[0] + asked[1]) == sorted(set(block.item_idx.tolist()))
    assert torch.equal(model(collator.collate(few, few)), first)
    assert len(asked) == 2
    model.train()
    for _ in range(2):
        model(collator.collate(few, few))
    model.eval()(collator.collate(few, few))
    assert asked[2:] == [sorted(set(few.item_idx.tolist()))] * 3


def test_dropout_spares_likelihoods_without_a_history(tmp_path):
    backbone = make_model("llama")
    add_lora(backbone, rank=2, alpha=4, dropout=0.5, target_modules=("q_proj",), seed=1)
    torch.nn.init.normal_(next(weight for name, weight in backbone.named_parameters() if "lora_B" in name), std=0.5)
    backbone.double()
    model, collator, _ = make_scorer(STAGE1, tmp_path, backbone=backbone)
    block = make_block([4])  # the first context of a block has no history
    batch = collator.collate(block, block)
    model.eval()
    assert model(batch).abs().max() < SCORE_TOLERANCE  # the two terms are equal
    model.train()
    found = [model(batch, dropout_key=key) for key in (1, 2, 1)]
    assert torch.equal(found[0], found[2])
    assert (found[0] - found[1]).abs().max() > 1e-3
    dropping = [module for module in backbone.modules() if isinstance(module, DroppedLinear)]
    assert len(dropping) == 2
    assert all(module.training for module in dropping)
    assert not backbone.training


def test_step_0_is_the_anchor(tmp_path):
    model, collator, _ = make_scorer(STAGE1, tmp_path, anchored_score=AnchoredScore())
    block = make_block([6, 5])
    batch = dataclasses.replace(collator.collate(block, block), anchors=torch.linspace(-1, 1, 11))
    anchored, alone = model(batch, with_llm_scores=True)
    assert torch.equal(anchored, batch.anchors)
    assert alone.std() > 0.01


def test_titles_of_a_single_token_score_zero(tmp_path):
    model, collator, _ = make_scorer(STAGE1, tmp_path)
    block = make_block([2, 3])
    batch = dataclasses.replace(collator.collate(block, block), title_places=torch.zeros(0, dtype=torch.int64))
    model.backbone.requires_grad_(True)
    model._title_priors._lay_out = lambda items: dataclasses.replace(
        collator.lay_out_without_history(items), title_places=batch.title_places
    )
    scores = model(batch)
    scores.sum().backward()
    assert scores.tolist() == [0.0] * 5
