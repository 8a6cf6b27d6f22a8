"""Shared contexts against plain padded rows on published weights, their tokenizers and real-looking titles."""

from __future__ import annotations

import pytest
import torch

from collm_dist.data.prompts.item_tokens import load_item_tokens
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.prompts.prompt_template import PromptTemplate, resolve_answer_ids
from collm_dist.data.samples.pair_features import PAIR_FEATURES
from collm_dist.errors import DataError
from collm_dist.llm.backbone import load_backbone
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.lora import add_lora
from collm_dist.llm.packed.decoder import PackedDecoder, find_decoder
from collm_dist.llm.slot_mapping import SlotMapper
from tests.parity.test_shared_context import Tables, collect_gradients, compute_loss, make_block
from tests.reference.padded_rows import score_plainly, spell_prompts

BACKBONES = ("smollm2-135m-instruct-q4_1", "gemma-3-270m-q4_k_m")
STAGE1 = "#Question: A user has liked these films: <ItemTitleList>. Will the user like <TargetItemTitle>? #Answer:"
STAGE2 = (
    "#Question: A user has liked these films: <ItemTitleList>. User <UserID> is shown <TargetItemTitle> with "
    "<TargetItemID>, match <MatchID>. Like it? #Answer:"
)
TITLES = [
    "The Long Way to Harbour (1994)", "Édouard et la mer", "Night Train, Part II", "7 Days", "Un été à Prague (1971)",
    "Crimson \"Ghost\"", "Moon over Kyoto: The Return", "Heat of the Plains (1988)",
]  # fmt: skip
# float32 weights computed in float32, up to 30 layers. Measured: scores 1.4e-5, gradients 2.3e-5 relative.
SCORE_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request):
    try:
        return load_backbone(request.param, dtype="float32")
    except DataError as error:
        pytest.skip(f"the weights cannot be fetched here: {error}")


def build(backbone, template, tmp_path, *, slots):
    """Return a batch of our collator, the block, the same samples as plain prompts, and the answers."""
    tokenizer = backbone.tokenizer
    collator = PromptCollator(
        PromptTemplate.parse(template, allow_slots=slots, user_depends_on_target=False),
        load_item_tokens(tmp_path, TITLES, tokenizer, max_tokens=100),
        tokenizer,
        history_length=4,
        cf_history_length=4,
        max_prompt_tokens=1000,
        empty_history_text="(nothing yet)",
        tokens_per_slot=1,
        user_depends_on_target=False,
    )
    block = make_block([2, 1, 8, 3])
    samples = spell_prompts(block, template, TITLES, tokenizer, history_length=4)
    return collator.collate(block, block), block, samples, resolve_answer_ids(tokenizer, " Yes", " No")


def assert_close(ours, plain, our_gradients, plain_gradients):
    assert (ours - plain).abs().max() < SCORE_TOLERANCE * plain.abs().max(), (ours, plain)
    worst = max(((our_gradients[name] - value).norm() / value.norm()).item() for name, value in plain_gradients.items())
    assert worst < GRADIENT_TOLERANCE
    print(f"scores {(ours - plain).abs().max() / plain.abs().max():.1e}, gradients {worst:.1e}")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_stage2(backbone, checkpointing, tmp_path):
    batch, block, samples, answers = build(backbone, STAGE2, tmp_path, slots=True)
    tables = Tables().float()
    embeddings = backbone.model.get_input_embeddings().weight
    mapper = SlotMapper(
        cf_dim=6, pair_dim=len(PAIR_FEATURES), llm_dim=embeddings.shape[1], hidden_multiple=3, tokens_per_slot=1,
        out_scale=float(embeddings[:1000].square().mean().sqrt()), seed=2,
    )  # fmt: skip
    plain = score_plainly(
        backbone.model, samples, block, answers, slot_mapper=mapper, cf_model=tables, pair_features=batch.pair_features
    )
    plain_gradients = collect_gradients(compute_loss(plain, batch), mapper)
    decoder = PackedDecoder(find_decoder(backbone.model), checkpointing=checkpointing)
    model = CollmModel(backbone.model, answers, "yes_minus_no", mapper, tables, decoder=decoder)
    ours = model.train()(batch)
    gradients = collect_gradients(compute_loss(ours, batch), mapper)
    decoder.restore()
    assert_close(ours, plain, gradients, plain_gradients)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_stage1(backbone, checkpointing, tmp_path):
    batch, block, samples, answers = build(backbone, STAGE1, tmp_path, slots=False)
    wrapper = add_lora(backbone.model, rank=4, alpha=8, dropout=0.0, target_modules=("q_proj", "v_proj"), seed=1)
    torch.manual_seed(3)
    for name, parameter in backbone.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    plain = score_plainly(backbone.model, samples, block, answers)
    plain_gradients = collect_gradients(compute_loss(plain, batch), backbone.model)
    decoder = PackedDecoder(find_decoder(backbone.model), checkpointing=checkpointing)
    model = CollmModel(backbone.model, answers, "yes_minus_no", decoder=decoder)
    ours = model.train()(batch)
    gradients = collect_gradients(compute_loss(ours, batch), backbone.model)
    decoder.restore()
    wrapper.unload()
    assert_close(ours, plain, gradients, plain_gradients)
