"""Which way of tuning teaches a small language model most from titles: rank, layers, learning rate, prompt, backbone?

    python -m benchmarks.title_tuning --data DIR [--ways NAME ...] [--list]

Each way tunes a backbone to tell from an item's title alone how much people like the item (cross-entropy of " Yes" less
" No", AdamW, cosine schedule; a way is comparable with those of its precision). The training rows of an item are taken
together: the label is their share of likes, the weight their number, so a pass sees all training rows in a tenth of the
time. Plain transformers and peft on one thread: this project trains rows, not items. Scores are those of the validation
rows; test is not opened. DIR holds interactions.parquet and items.parquet of MovieLens-1M. Finished ways are kept in
title_tuning_ml1m.json, so the command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.lib.machine import RESULTS, TUNING_PACKAGES, describe_run
from collm_dist.llm.backbone import load_backbone
from collm_dist.llm.lora import add_lora
from collm_dist.metrics import compute_auc, compute_logloss, compute_uauc
from collm_dist.runs.atomic_files import write_json

RESULT = "title_tuning_ml1m.json"
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMOLLM2, GEMMA = "smollm2-135m-instruct-q4_1", "gemma-3-270m-q4_k_m"
FORMS = {
    "question first": 'Will this person like "{title}"? Answer:',
    "question last": '"{title}". Will this person like it? Answer:',
    "chat template": 'Will this person like "{title}"?',
}


@dataclass(frozen=True)
class Way:
    """A way of tuning; ``rank`` 0 trains all weights of the layers."""

    rank: int = 16
    layers: tuple[str, ...] = LINEAR_LAYERS
    learning_rate: float = 2e-4
    form: str = "question first"
    backbone: str = SMOLLM2
    steps: int = 182
    items_per_step: int = 32
    warmup_steps: int = 30
    dtype: str = "bfloat16"


WAYS = {
    "base": Way(),
    "rank 8, q and v": Way(rank=8, layers=("q_proj", "v_proj")),
    "rank 8, q and v, 1e-3": Way(rank=8, layers=("q_proj", "v_proj"), learning_rate=1e-3),
    "full, 2e-5": Way(rank=0, learning_rate=2e-5),
    "full, 1e-4": Way(rank=0, learning_rate=1e-4),
    "Gemma-3-270M": Way(backbone=GEMMA),
    "5e-4": Way(learning_rate=5e-4),
    "1e-3": Way(learning_rate=1e-3),
    "base, float32": Way(dtype="float32"),
    "question last, float32": Way(form="question last", dtype="float32"),
    "chat template, float32": Way(form="chat template", dtype="float32"),
    "rank 64, float32": Way(rank=64, dtype="float32"),
    "Gemma-3-270M, full, 1e-4, float32": Way(rank=0, learning_rate=1e-4, backbone=GEMMA, dtype="float32"),
}


class TitleReader:
    """A backbone that scores titles, and the weights that are tuned, which are kept in float32 too."""

    def __init__(self, way: Way, titles: dict[int, str]) -> None:
        """Load the backbone and tokenize the prompts of all titles."""
        backbone = load_backbone(way.backbone, dtype=way.dtype)
        tokenizer, model = backbone.tokenizer, backbone.model
        is_chat = way.form == "chat template"
        answers = [tokenizer(word, add_special_tokens=False)["input_ids"][0]
                   for word in (("Yes", "No") if is_chat else (" Yes", " No"))]  # fmt: skip
        self._prompts = {}
        for item, title in titles.items():
            text = FORMS[way.form].format(title=title)
            if is_chat:
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
                )
            self._prompts[item] = tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
        head = model.get_output_embeddings().weight.detach()
        self._answer = (head[answers[0]] - head[answers[1]]).float()
        self._decoder = model.model
        if way.rank:
            add_lora(model, rank=way.rank, alpha=2 * way.rank, dropout=0.05, target_modules=way.layers, seed=0)
        else:
            self._decoder.layers.requires_grad_(True)
        self._model = model.train()
        self._live = [weight for weight in model.parameters() if weight.requires_grad]
        self.weights = [weight.detach().float().requires_grad_() for weight in self._live]

    def score(self, items: list[int]) -> Tensor:
        """Return the (N,) logits of a like of N items."""
        prompts = [self._prompts[item] for item in items]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        hidden = self._decoder(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        scores: Tensor = hidden[torch.arange(len(prompts)), lengths - 1].float() @ self._answer
        return scores

    @torch.no_grad()
    def score_all(self, items: list[int]) -> dict[int, float]:
        """Return the logit of each item, without dropout."""
        self._model.eval()
        ordered = sorted(items, key=lambda item: len(self._prompts[item]))
        parts = [ordered[start : start + 64] for start in range(0, len(ordered), 64)]
        scores = {item: value for part in parts for item, value in zip(part, self.score(part).tolist(), strict=True)}
        self._model.train()
        return scores

    def collect_gradients(self) -> None:
        """Move the gradients of a backward pass to ``weights``."""
        for live, weight in zip(self._live, self.weights, strict=True):
            weight.grad, live.grad = live.grad.float(), None

    @torch.no_grad()
    def take_weights(self) -> None:
        """Copy ``weights`` into the backbone."""
        for live, weight in zip(self._live, self.weights, strict=True):
            live.copy_(weight)


def tune(way: Way, rows: pd.DataFrame, titles: dict[int, str]) -> list[dict[str, float]]:
    """Tune one way; return the metrics of all validation rows at half time and at the end."""
    torch.manual_seed(0)
    reader = TitleReader(way, titles)
    likes = rows[rows.split == "train"].groupby("item_id").label.agg(["size", "mean"])
    optimizer = torch.optim.AdamW(reader.weights, lr=way.learning_rate, weight_decay=0.0)
    batches, history = _draw(likes.index.to_numpy(), way.items_per_step), []
    for step in range(1, way.steps + 1):
        warmup = min(1.0, step / way.warmup_steps)
        rest = max(0, step - way.warmup_steps) / (way.steps - way.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = way.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * rest))
        items = next(batches)
        chosen = likes.loc[items]
        labels = torch.tensor(chosen["mean"].to_numpy(), dtype=torch.float32)
        weights = torch.tensor(chosen["size"].to_numpy() / likes["size"].mean(), dtype=torch.float32)
        binary_cross_entropy_with_logits(reader.score(items), labels, weights).backward()
        reader.collect_gradients()
        torch.nn.utils.clip_grad_norm_(reader.weights, 1.0)
        optimizer.step()
        reader.take_weights()
        if step in (way.steps // 2, way.steps):
            history.append({"step": step} | validate(reader, rows[rows.split == "valid"]))
            print(history[-1], flush=True)
    return history


def _draw(items: np.ndarray[Any, Any], size: int) -> Iterator[list[int]]:
    """Yield items in random order, pass after pass."""
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(items)
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size].tolist()


def validate(reader: TitleReader, rows: pd.DataFrame) -> dict[str, float]:
    """Return AUC, UAUC and log-loss of rows."""
    by_item = reader.score_all(sorted(set(rows.item_id)))
    labels, scores = rows.label.to_numpy(np.float64), rows.item_id.map(by_item).to_numpy(np.float64)
    uauc, _ = compute_uauc(labels, scores, rows.user_id.to_numpy())
    return {"auc": compute_auc(labels, scores) or 0.5, "uauc": uauc or 0.5, "logloss": compute_logloss(labels, scores)}


def main() -> None:
    """Tune each way that the result lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with interactions.parquet and items.parquet")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--list", action="store_true", help="print the ways and whether they are done")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.output / RESULT
    found = json.loads(path.read_text(encoding="utf-8"))["ways"] if path.exists() else []
    done = {way["name"]: way for way in found}
    rows = pd.read_parquet(arguments.data / "interactions.parquet")
    items = pd.read_parquet(arguments.data / "items.parquet")
    titles = dict(zip(items.item_id.tolist(), items.title.tolist(), strict=True))
    for name in arguments.ways:
        settings = json.loads(json.dumps(asdict(WAYS[name])))
        is_done = done.get(name, {}).get("settings") == settings
        print(f"{name}: {'done' if is_done else 'to do'}", flush=True)
        if is_done or arguments.list:
            continue
        done[name] = {"name": name, "settings": settings, "history": tune(WAYS[name], rows, titles)}
        ways = [done[name] for name in WAYS if name in done]
        run = describe_run(*TUNING_PACKAGES)
        write_json(path, {"question": (__doc__ or "").splitlines()[0], "ways": ways, **run})


if __name__ == "__main__":
    main()
