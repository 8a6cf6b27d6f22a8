"""Preview of the input and of prompts with their slots marked; needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from collm_dist.config import Config
from collm_dist.data.ingest.input_preview import preview_rows
from collm_dist.data.ingest.source import open_source
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.data.prompts.stage_prompts import build_collator
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.runs.run_dir import RunDir


def render_example(collator: PromptCollator, block: ContextBlock, tokenizer: Any) -> str:
    """Return the first target's prompt as a string, with slots marked and ⟪ at the end of the constant prefix."""
    block = block.take_targets(np.arange(1))
    batch = collator.collate(block, block)
    marks: dict[int, str] = {}
    kinds = {"UserID": batch.user_slots, "ItemID": batch.item_slots, "MatchID": batch.pair_slots}
    for name, slots in kinds.items():
        for position in slots.places.tolist():
            marks[position - len(batch.prefix_ids)] = f"⟦{name}⟧"
    header, prefix = batch.header_ids.tolist(), batch.prefix_ids.tolist()
    pieces: list[str] = [tokenizer.decode(header + prefix), "⟪"] if prefix else []
    pending: list[int] = [] if prefix else header
    skip = 0
    for column, token in enumerate(batch.tree_ids.tolist()):
        if column in marks:
            pieces += [tokenizer.decode(pending), marks[column]]
            pending, skip = [], collator.tokens_per_slot - 1
        elif skip:
            skip -= 1
        else:
            pending.append(token)
    return "".join([*pieces, tokenizer.decode(pending)])


def print_preview(config: Config, run_dir: RunDir, num_prompts: int, load_tokenizer: Callable[[], Any]) -> None:
    """Print the interpretation of the input and, if the data step is done, prompts of both stages.

    Args:
        config: the experiment.
        run_dir: its run directory.
        num_prompts: number of prompts per stage; 0 = the input alone.
        load_tokenizer: returns the backbone's tokenizer; called only if there are prompts to show.
    """
    source = open_source(config.dataset)
    described = source.describe()
    described.pop("times in the first rows", None)  # the facts have those of more rows
    for key, value in described.items():
        print(f"{key}: {value}")
    print("\n".join(preview_rows(source)), flush=True)
    if num_prompts == 0:
        return
    if not run_dir.is_done("data"):
        print("prompts: shown once the data step is done; run this command without --preview first")
        return
    tokenizer = load_tokenizer()
    answers = resolve_answer_ids(tokenizer, config.prompt.yes, config.prompt.no)
    print(f"answers: {config.prompt.yes!r} is token {answers[0]}, {config.prompt.no!r} is token {answers[1]}")
    data_dir = run_dir.step_dir("data")
    order = GlobalOrder(
        data_dir, load_manifest(data_dir), "train", config.run.seed, num_prompts, max_contexts=num_prompts
    )
    batch = next(order.iter_batches())
    for stage in ("stage1", "stage2"):
        collator = build_collator(config, run_dir, tokenizer, stage)
        block = collator.cut_contexts(batch)
        counts = collator.count_tokens(block)
        for target in range(min(num_prompts, block.num_targets)):
            context = block.target_contexts[target]
            parts = counts.prefix[context], counts.tail[context], counts.branch[target]
            prefix, tail, branch = map(int, parts)
            total = counts.header + prefix + tail + branch
            label = "like" if block.label[target] else "dislike"
            print(f"\n{stage}, row {block.row_id[target]} ({label}); tokens: {total} (header {counts.header}, "
                  f"prefix {prefix}, context tail {tail}, target {branch})")  # fmt: skip
            print(render_example(collator, block.take_targets(np.array([target])), tokenizer))
        print(f"\n{stage}: {collator.num_cut_titles} item texts are cut at prompt.max_title_tokens; "
              f"{collator.num_dropped_history} history items were dropped in these prompts")  # fmt: skip
        if collator.num_cut_users:
            print(f"{stage}: {collator.num_cut_users} user texts are cut at prompt.max_user_text_tokens")
        if collator.num_dropped_ratings:
            print(f"{stage}: {collator.num_dropped_ratings} rated items were dropped as well")
        if collator.num_dropped_dislikes:
            print(f"{stage}: {collator.num_dropped_dislikes} disliked items were dropped as well")
