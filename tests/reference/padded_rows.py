"""Independent plain reference: one padded row for each target, the whole model, full-vocabulary logits.

Prompts are spelled out sample by sample in Python. Nothing of the package's prompt or model code is used, except that
slots are mapped by the very modules whose gradients are compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from collm_dist.data.shards.context_block import ContextBlock


@dataclass
class PlainSample:
    """Token ids of a prompt, 0 where a slot stands, and the slots as (column, kind, item or None)."""

    ids: list[int]
    slots: list[tuple[int, str, int | None]] = field(default_factory=list)


def spell_prompts(
    block: ContextBlock, template: str, texts: list[str], tokenizer, *, history_length: int, tokens_per_slot: int = 1
) -> list[PlainSample]:
    """Spell out every target's prompt, segment by segment."""

    def tokenize(text: str) -> list[int]:
        # A title that spells a special token, such as </s>, is text like any other.
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    samples = []
    for context in range(block.num_contexts):
        history = block.history_items[block.history_offsets[context] : block.history_offsets[context + 1]]
        history = history[max(len(history) - history_length, 0) :].tolist()
        for target in range(block.target_offsets[context], block.target_offsets[context + 1]):
            sample = PlainSample(list(tokenizer("a")["input_ids"][:-1]))
            item = int(block.item_idx[target])
            for piece in re.split(r"(<[A-Za-z]+>)", template):
                if piece == "<ItemTitleList>":
                    for position, history_item in enumerate(history):
                        sample.ids += tokenize(", ") if position else []
                        sample.ids += tokenize(f'"{texts[history_item]}"')
                    sample.ids += [] if history else tokenize("(nothing yet)")
                elif piece == "<TargetItemTitle>":
                    sample.ids += tokenize(f'"{texts[item]}"')
                elif piece == "<ItemIDList>":
                    for history_item in history:
                        sample.slots.append((len(sample.ids), "item", history_item))
                        sample.ids += [0] * tokens_per_slot
                elif piece in ("<UserID>", "<TargetItemID>", "<MatchID>"):
                    kind = {"<UserID>": "user", "<TargetItemID>": "item", "<MatchID>": "pair"}[piece]
                    sample.slots.append((len(sample.ids), kind, item if kind == "item" else None))
                    sample.ids += [0] * tokens_per_slot
                elif piece:
                    sample.ids += tokenize(piece)
            samples.append(sample)
    return samples


def score_plainly(
    model, samples, block, answers, *, slot_mapper=None, cf_model=None, pair_features=None, yes_only=False
):
    """Return (N,) scores from padded rows."""
    width = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        mask[row, : len(sample.ids)] = 1
    embeds = model.get_input_embeddings()(ids)
    rows = []
    owner = block.target_contexts
    for row, sample in enumerate(samples):
        pieces, start = [], 0
        for column, kind, item in sample.slots:
            if kind == "user":
                user = torch.tensor([int(block.user_idx[owner[row]])])
                time = torch.tensor([int(block.timestamp[row])])
                vector = cf_model.user_vectors(user, torch.zeros(1, 0, dtype=torch.int64), torch.tensor([-1]), time)
            elif kind == "item":
                vector = cf_model.item_vectors(torch.tensor([item]), torch.tensor([int(block.timestamp[row])]))
            else:
                vector = pair_features[row : row + 1]
            tokens = (slot_mapper.pair if kind == "pair" else slot_mapper.cf)(vector)[0]
            pieces += [embeds[row, start:column], tokens]
            start = column + len(tokens)
        rows.append(torch.cat([*pieces, embeds[row, start:]]))
    logits = model(inputs_embeds=torch.stack(rows), attention_mask=mask).logits
    last = mask.sum(1) - 1
    found = logits[torch.arange(len(samples)), last]
    return found[:, answers[0]] if yes_only else found[:, answers[0]] - found[:, answers[1]]
