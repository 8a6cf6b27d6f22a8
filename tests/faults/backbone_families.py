"""Every decoder family of transformers as a tiny random model: does it work, or is it refused in words?

    python -m tests.faults.backbone_families [FAMILY ...]

A family works if the scores of shared contexts equal those of plain padded rows, in float32. It is refused if the check
before work names the reason. Anything else is a fault. Writes backbones.json beside this file, and the table of
docs/reliability.md between its marks.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from collm_dist.errors import CollmError
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.packed.decoder import PackedDecoder, find_decoder
from collm_dist.tuning.preflight import check_backbone
from tests.parity.test_shared_context import STAGE1, TEXTS, make_block, make_collator
from tests.reference.padded_rows import score_plainly, spell_prompts
from tests.unit.test_preflight import make_config

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "reliability.md"
START, END = "<!-- backbones: start -->", "<!-- backbones: end -->"
SECONDS = 120
TOLERANCE = 1e-4
# Sizes by the names that configurations give them.
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 48, "n_inner": 48,
    "ffn_dim": 48, "d_ff": 48, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8,
    "max_position_embeddings": 2048, "n_positions": 2048, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "rotary_dim": 8, "first_k_dense_replace": 1,
    "word_embed_proj_dim": 32, "embedding_size": 32, "ffn_hidden_size": 48, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 300, "num_kv_shared_layers": 0, "decoder_layers": 2, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "attention_hidden_size": 32, "state_size": 4, "index_n_heads": 2, "index_head_dim": 8,
}  # fmt: skip


def build_tiny(model_type: str):
    """Return a tiny configuration of a family."""
    defaults = AutoConfig.for_model(model_type).get_text_config().to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in defaults}
    if "kv_lora_rank" in defaults:  # latent attention has no groups
        sizes["num_key_value_heads"] = 4
    if defaults.get("layer_types"):
        kinds = list(dict.fromkeys(defaults["layer_types"]))
        sizes["layer_types"] = (kinds * 2)[:2]
    return type(AutoConfig.for_model(model_type).get_text_config())(**sizes)


def try_family(model_type: str, answers) -> None:
    """Put (outcome, words) of a family into a queue."""
    warnings.simplefilter("ignore")
    try:
        answers.put(judge_family(model_type))
    except Exception as error:  # what a user would see as an internal error
        traceback.print_exc()
        answers.put(("fault", f"{type(error).__name__}: {error}".splitlines()[0][:200]))


def judge_family(model_type: str) -> tuple[str, str]:
    """Return works or refused, and the largest error or the reason."""
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(build_tiny(model_type), dtype=torch.float32).eval()
    except Exception as error:  # transformers cannot make it small, or needs a package that is not there
        return "not tried", f"{type(error).__name__}: {error}".splitlines()[0][:100]
    with tempfile.TemporaryDirectory() as name:
        tokenizer, collator = make_collator(STAGE1, Path(name) / "tokens", stage2=False)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(name)
        tokenizer.save_pretrained(name)
        try:
            check_backbone(make_config(name, stage1={"enabled": False}))
            block = make_block([1, 3, 2])
            samples = spell_prompts(block, STAGE1, TEXTS, tokenizer, history_length=4)
            try:
                model(torch.ones(1, 8, dtype=torch.int64))
            except Exception as error:  # sizes that do not fit each other
                return "not tried", f"{type(error).__name__}: {error}".splitlines()[0][:100]
            answer_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (" Yes", " No"))
            with torch.no_grad():
                expected = score_plainly(model, samples, block, answer_ids)
                packed = CollmModel(model, answer_ids, "yes_minus_no", decoder=PackedDecoder(find_decoder(model)))
                scores = packed(collator.collate(block, block))
        except CollmError as error:
            reason = str(error).splitlines()[-1].strip().removeprefix("llm.backbone: ")
            return "refused", reason.replace(name, model_type).partition(", so contexts")[0]
    difference = float((scores.double() - expected.double()).abs().max())
    return ("works" if difference < TOLERANCE else "fault"), f"{difference:.0e}"


def render(outcomes) -> str:
    """Return the table of families by outcome, and the reasons of those that are refused."""
    by_outcome: dict[str, list[str]] = {}
    for name, (outcome, words) in outcomes.items():
        reason = words if outcome in ("refused", "fault") else ""
        reason = reason.removeprefix(f"a {name} model ").partition(";")[0]
        by_outcome.setdefault(f"{outcome}: {reason}" if reason else outcome, []).append(name)
    rows = sorted(by_outcome.items(), key=lambda item: (item[0] != "works", item[0]))
    lines = ["| outcome | families |", "|:--|:--|"]
    return "\n".join([*lines, *(f"| {outcome} | {', '.join(names)} |" for outcome, names in rows)])


def main() -> int:
    """Try every family and return 1 if one is a fault."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")  # the imports take seconds
    outcomes = {}
    for model_type in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        answers = context.Queue()
        process = context.Process(target=try_family, args=(model_type, answers))
        process.start()
        try:
            outcomes[model_type] = answers.get(timeout=SECONDS)
        except queue.Empty:
            outcomes[model_type] = ("not tried", f"no answer within {SECONDS} s")
        process.kill()
        print(model_type, *outcomes[model_type], flush=True)
    path = FOLDER / "backbones.json"
    known = json.loads(path.read_text(encoding="utf-8")) if sys.argv[1:] and path.exists() else {}
    outcomes = dict(sorted((known | outcomes).items()))
    path.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    PAGE.write_text(f"{before}{START}\n\n{render(outcomes)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return int(any(outcome == "fault" for outcome, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
