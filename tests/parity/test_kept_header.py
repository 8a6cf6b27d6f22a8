"""The header's keys and values: computed once while nothing trains, and again after weights may have changed."""

from __future__ import annotations

import pytest
import torch

from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.llm import collm
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.lora import add_lora
from tests.parity.test_shared_context import STAGE1, make_block, make_collator
from tests.tiny import make_model


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """Return a model with an adapter, batches for scoring, and a list with an entry for each computed header."""
    computed = []
    plain = collm.run_prefix

    def run_prefix(decoder, embeds, lengths, *header):
        if not header:
            computed.append(len(embeds))
        return plain(decoder, embeds, lengths, *header)

    monkeypatch.setattr(collm, "run_prefix", run_prefix)
    tokenizer, collator = make_collator(STAGE1, tmp_path, stage2=False)
    scoring = collator.for_scoring()
    backbone = make_model("llama")
    add_lora(backbone, rank=2, alpha=4, dropout=0.0, target_modules=("q_proj", "v_proj"), seed=1)
    model = CollmModel(backbone.double(), resolve_answer_ids(tokenizer, " Yes", " No"), "yes_minus_no")
    batches = [scoring.collate(block, block) for block in map(make_block, ([2, 1], [3, 2, 1], [4]))]
    assert all(len(batch.header_ids) for batch in batches)
    return model, batches, computed


def score(model, batches):
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


def change(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()


def test_computed_once_in_scoring_and_again_with_new_weights(setting):
    model, batches, computed = setting
    model.eval()
    before = score(model, batches)
    assert torch.equal(score(model, batches), before)
    assert len(computed) == 1
    model.train()
    change(model)
    model.eval()
    after = score(model, batches)
    assert len(computed) == 2
    assert (after - before).abs().max() > 1e-3
    for batch, expected in zip(batches, after.split([len(batch.labels) for batch in batches]), strict=True):
        model.eval()  # drops the header
        assert torch.equal(score(model, [batch]), expected)


def test_never_kept_while_the_backbone_trains_and_kept_while_it_is_frozen(setting):
    model, batches, computed = setting
    model.train()
    score(model, batches)
    assert len(computed) == len(batches)
    model.requires_grad_(False)
    score(model, batches)
    assert len(computed) == len(batches) + 1
    model.train()  # as every step does
    score(model, batches)
    assert len(computed) == len(batches) + 1
    model.eval()
    score(model, batches)
    assert len(computed) == len(batches) + 2


def test_another_prompt_gets_its_own_header(setting, tmp_path):
    model, batches, computed = setting
    _, other = make_collator("Seen: <ItemTitleList>. And <TargetItemTitle>? Answer:", tmp_path / "other", stage2=False)
    block = make_block([2, 1])
    other_batch = other.for_scoring().collate(block, block)
    model.eval()
    alone = score(model, [other_batch])
    score(model, batches)
    assert torch.equal(score(model, [other_batch]), alone)
    assert len(computed) == 3
