"""One side of benchmarks/throughput.py and memory.py, in a process of its own.

    ours            the product: TuningLoop.train_step, score_split
    hf_trainer      transformers.Trainer with peft: dynamic padding, rows of a global batch sorted by length, and as
                    many rows in a micro-batch as were fastest in a trial
    reference       the authors' recipe: rows in their order, 16 at a time, padded to the longest, logits everywhere
    reference_last  the same with logits at the last position alone

A first line on standard input lets it begin, and is answered when all is ready; each line ``N`` works through batch N
and is answered with its seconds and the bytes by which memory rose above the weights. ``rest`` gives back what a GPU's
allocator keeps for later. Batches are asked for in the order that --order has said.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.tuning_workload import TRAINING, GivenBlocks, choose_blocks
from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.llm.backbone import load_backbone
from collm_dist.llm.lora import add_lora
from collm_dist.monitoring import PeakMeter
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.engine import init_distributed
from collm_dist.tuning.run_stage import build_loop
from collm_dist.tuning.scoring import AUTO_TOKENS, score_split
from collm_dist.tuning.stage import get_stage
from collm_dist.tuning.step_batches import iter_step_batches

REFERENCE_ROWS = 16
TRIED_ROWS = {"cpu": (4, 8, 16, 32), "cuda": (16, 32, 64, 128, 256)}
REST = "rest"
IGNORED = -100

Work = Callable[[int], None]


def build_ours(config: Config, phase: str, num_batches: int) -> tuple[Work, torch.device, dict[str, Any]]:
    """Return the product's way of working through a batch, and the tokens of a micro-batch at most."""
    run_dir, device = RunDir(Path(config.run.dir)), init_distributed(5)
    stage = get_stage(config, "stage1" if phase.startswith("stage1") else "stage2")
    loaded = stage.build(run_dir, device)
    touch_weights(loaded.model)
    blocks = choose_blocks(config, phase, num_batches)
    if not phase.startswith(TRAINING):
        loaded.model.eval().requires_grad_(False)
        most = config.evaluation.max_tokens_per_micro_batch

        def score(number: int) -> None:
            score_split(loaded, GivenBlocks((blocks[number],)), most)  # type: ignore[arg-type]

        return score, device, {"max_tokens": AUTO_TOKENS[device.type] if most == "auto" else most}
    loop = build_loop(config, run_dir, stage, loaded, {})

    # Training lays out what comes next while the model computes, and the peers' rows are finished, too.
    ahead = list(iter_step_batches(iter(blocks), loaded.collator, loop.max_tokens, device))

    def train(number: int) -> None:
        loop.train_step(ahead[number])

    if phase == "stage2_cached":
        for number in range(num_batches):
            train(number)
    assert stage.settings.global_batch_size == blocks[0].num_targets
    return train, device, {"max_tokens": loop.max_tokens}


class PlainModel(nn.Module):
    """A backbone with soft tokens put among its input embeddings, one padded row for each target."""

    def __init__(self, backbone: Any, config: Config, slot_widths: dict[str, int], *, lora: bool) -> None:
        super().__init__()
        if lora:
            one = config.lora
            backbone = add_lora(
                backbone, rank=one.rank, alpha=one.alpha, dropout=one.dropout, target_modules=one.target_modules, seed=0
            )
        self.backbone = backbone
        width = backbone.get_input_embeddings().weight.shape[1]
        self.mappings = nn.ModuleDict()
        for kind, size in slot_widths.items():
            name = "pair" if kind == "pair" else "cf"
            if name not in self.mappings:
                hidden = config.mapping.hidden_multiple * size
                self.mappings[name] = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        slots: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Return the backbone's output."""
        embeds = self.backbone.get_input_embeddings()(input_ids)
        for kind, (rows, columns, vectors) in (slots or {}).items():
            tokens = self.mappings["pair" if kind == "pair" else "cf"](vectors)
            embeds = embeds.index_put((rows, columns), tokens.to(embeds.dtype))
        return self.backbone(
            inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, use_cache=False, **options
        )


def pad(rows: list[dict[str, Any]], *, left: bool, answers: list[int] | None, device: torch.device) -> dict[str, Any]:
    """Return a padded batch; with ``answers`` each row ends with its answer, which is the only label."""
    ids = [row["ids"] + ([answers[1 - row["label"]]] if answers else []) for row in rows]
    width = max(map(len, ids))
    input_ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED)
    places: dict[str, tuple[list[int], list[int], list[Any]]] = {}
    for number, one in enumerate(ids):
        start = width - len(one) if left else 0
        input_ids[number, start : start + len(one)] = torch.tensor(one)
        mask[number, start : start + len(one)] = 1
        labels[number, start + len(one) - 1] = one[-1]
        for column, kind, vector in rows[number]["slots"]:
            found = places.setdefault(kind, ([], [], []))
            for values, value in zip(found, (number, start + column, vector), strict=True):
                values.append(value)
    slots = {kind: tuple(torch.tensor(one, device=device) for one in found) for kind, found in places.items()}
    batch: dict[str, Any] = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device), "slots": slots}
    return batch | {"labels": labels.to(device)} if answers else batch


class Reference:
    """The plain way."""

    def __init__(self, config: Config, rows: dict[str, Any], phase: str, device: torch.device, *, last: bool) -> None:
        self.rows, self.device, self.last, self.training = rows, device, last, phase in TRAINING
        self.model = build_plain_model(config, rows, phase).to(device).train(self.training)
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if self.training else None

    def work(self, number: int) -> None:
        """Work through a batch."""
        batch = self.rows["batches"][number]
        yes, no = self.rows["answer_ids"]
        with torch.set_grad_enabled(self.training):
            for first in range(0, len(batch), REFERENCE_ROWS):
                part = batch[first : first + REFERENCE_ROWS]
                options = {"logits_to_keep": 1} if self.last else {}
                logits = self.model(**pad(part, left=True, answers=None, device=self.device), **options).logits[:, -1]
                scores = logits[:, yes] - logits[:, no]
                if self.training:
                    labels = torch.tensor([float(row["label"]) for row in part], device=self.device)
                    loss = nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
                    (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
                else:
                    scores.cpu()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def build_plain_model(config: Config, rows: dict[str, Any], phase: str) -> PlainModel:
    """Return the peers' model of a phase, from the backbone as it is published."""
    backbone = load_backbone(config.llm.backbone, dtype=config.llm.dtype, attention=config.llm.attention).model
    widths = {kind: len(vector) for _, kind, vector in rows["batches"][0][0]["slots"]}
    touch_weights(backbone)
    return PlainModel(backbone, config, widths, lora=phase == "stage1")


def touch_weights(model: nn.Module) -> None:
    """Bring weights that are mapped from a file into memory: their first use would count as a pass's own memory."""
    for one in model.parameters():
        one.sum()


def serve(work: Work, device: torch.device, ready: dict[str, Any], channel: Any) -> None:
    """Answer the lines of standard input."""
    torch.cuda.empty_cache()
    meter = start_meter(device)
    print(json.dumps(ready), file=channel, flush=True)
    for number in read_requests(channel):
        print(json.dumps(measure(work, number, device, meter)), file=channel, flush=True)


def start_meter(device: torch.device) -> PeakMeter:
    """Return what measures how far memory rises above where it stands now."""
    with PeakMeter(device, from_first=True) as meter:
        return meter


def read_requests(channel: Any) -> Iterator[int]:
    """Yield the batches that are asked for; rest when told to."""
    for line in iter(sys.stdin.readline, ""):
        if line.strip() != REST:
            yield int(line)
            continue
        torch.cuda.empty_cache()
        print("{}", file=channel, flush=True)


def measure(work: Work, number: int, device: torch.device, meter: PeakMeter | None = None) -> dict[str, float]:
    """Work through a batch and return seconds and bytes; without a meter, above where memory stands now."""
    with meter or PeakMeter(device) as meter:
        started = time.perf_counter()
        work(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "extra_bytes": meter.extra_bytes}


def main() -> None:
    """Build the side and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", required=True, choices=["ours", "hf_trainer", "reference", "reference_last"])
    parser.add_argument("--phase", required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="what write_rows wrote")
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--order", type=int, nargs="+", required=True)
    arguments = parser.parse_args()
    # Answers alone go to the real standard output; whatever libraries print goes to the other one.
    channel, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    config = load_config(arguments.config, [])
    if not sys.stdin.readline():
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.side == "ours":
        serve(*build_ours(config, arguments.phase, arguments.batches), channel)
        return
    rows = json.loads(arguments.rows.read_text(encoding="utf-8"))
    if arguments.side == "hf_trainer":
        from benchmarks.lib.tuning_hf_trainer import run_hf_trainer

        run_hf_trainer(config, rows, arguments.phase, device, channel, arguments.order)
        return
    side = Reference(config, rows, arguments.phase, device, last=arguments.side == "reference_last")
    serve(side.work, device, {"rows_per_micro_batch": REFERENCE_ROWS}, channel)


if __name__ == "__main__":
    main()
