"""The side ``hf_trainer`` of ``tuning_side``: transformers.Trainer, set up as well as its settings allow."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.lib.tuning_side import TRIED_ROWS, build_plain_model, measure, pad, read_requests, start_meter
from benchmarks.lib.tuning_workload import TRAINING
from collm_dist.config import Config


class InTurn(TrainerCallback):
    """Lets the trainer make a step whenever one is asked for, and answers with what it took."""

    def __init__(self, device: torch.device, channel: Any, requests: Iterator[int]) -> None:
        self.device, self.channel, self.requests = device, channel, requests
        self.started, self.meter = 0.0, start_meter(device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the request. Its batch is on its way already, so loading is not measured."""
        if next(self.requests, None) is None:
            sys.exit()
        self.meter.__enter__()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answer."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        self.meter.__exit__()
        answer = {"seconds": seconds, "extra_bytes": self.meter.extra_bytes}
        print(json.dumps(answer), file=self.channel, flush=True)


class InOrder(Trainer):
    """A trainer that takes the rows as they are given."""

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)


def build_trainer(
    model: Any, batches: list[list[dict[str, Any]]], answers: list[int], rows: int, folder: str, device: torch.device
) -> InOrder:
    """Return a trainer over whole batches, the rows of each sorted by length."""
    dataset = [row for batch in batches for row in sorted(batch, key=lambda one: len(one["ids"]))]
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=len(batches[0]) // rows,
        max_steps=len(batches),
        learning_rate=1e-4,
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda",
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
    )

    def collate(part: list[dict[str, Any]]) -> dict[str, Any]:
        batch = pad(part, left=False, answers=answers, device=torch.device("cpu"))
        return batch if batch["slots"] else {name: one for name, one in batch.items() if name != "slots"}

    return InOrder(
        model,
        arguments,
        train_dataset=dataset,  # type: ignore[arg-type]
        data_collator=collate,
        preprocess_logits_for_metrics=lambda logits, labels: _pick(logits, labels, answers),
    )


def _pick(logits: torch.Tensor, labels: torch.Tensor, answers: list[int]) -> torch.Tensor:
    """Return the answers' logits before the label's position."""
    last = (labels >= 0).int().argmax(dim=1) - 1
    return logits[torch.arange(len(logits)), last][:, answers]


def run_hf_trainer(
    config: Config, rows: dict[str, Any], phase: str, device: torch.device, channel: Any, order: list[int]
) -> None:
    """Find the fastest micro-batch, say so, and work in turn."""
    answers, batches = rows["answer_ids"], rows["batches"]
    rows_of_batch = len(batches[0])
    longest = max(batches, key=lambda batch: max(len(row["ids"]) for row in batch))
    sizes = [size for size in TRIED_ROWS[device.type] if phase not in TRAINING or rows_of_batch % size == 0]
    model = build_plain_model(config, rows, phase).to(device)
    with tempfile.TemporaryDirectory() as folder:

        def build(chosen: list[list[dict[str, Any]]], size: int) -> InOrder:
            return build_trainer(model, chosen, answers, size, folder, device)

        def try_size(size: int) -> float | None:
            trainer = build([longest], size)
            run = trainer.train if phase in TRAINING else lambda: trainer.predict(trainer.train_dataset)
            try:
                # On a GPU the first pass of each size asks for memory and chooses kernels.
                return min(measure(lambda _: run() and None, 0, device)["seconds"] for _ in range(passes))  # type: ignore[func-returns-value]
            except RuntimeError as error:
                # cuBLAS, where nothing is left for its own memory, raises no OutOfMemoryError.
                if not isinstance(error, torch.cuda.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
                    raise
            # Outside of the handler, whose error would keep the failed pass's tensors.
            torch.cuda.empty_cache()
            return None

        passes = 2 if device.type == "cuda" else 1
        try_size(sizes[-1])  # warms up
        trials = {size: try_size(size) for size in sizes}
        fitting = {size: seconds for size, seconds in trials.items() if seconds is not None}
        best = min(fitting, key=lambda size: fitting[size])
        torch.cuda.empty_cache()
        print(json.dumps({"rows_per_micro_batch": best, "trials": trials}), file=channel, flush=True)
        requests = read_requests(channel)
        if phase in TRAINING:
            trainer = build([batches[number] for number in order], best)
            trainer.add_callback(InTurn(device, channel, requests))
            trainer.train()
            next(requests, None)  # rests until the end
            return
        trainers = [build([batch], best) for batch in batches]
        meter = start_meter(device)
        for number in requests:
            one = trainers[number]
            answer = measure(lambda _: one.predict(one.train_dataset) and None, 0, device, meter)  # noqa: B023
            print(json.dumps(answer), file=channel, flush=True)
