"""The peer ``hf_trainer``: transformers.Trainer on padded rows, those of each global batch sorted by length."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.lib.padded_model import PaddedModel, pad
from benchmarks.lib.step_meter import answer_requests, measure, read_requests, send
from collm_dist.monitoring import PeakMeter

TRIAL_ROWS = {"cpu": (4, 8, 16, 32), "cuda": (16, 32, 64, 128, 256)}


class StepOnRequest(TrainerCallback):
    """Make the trainer wait for a request before each step and answer with the step's measurement."""

    def __init__(self, device: torch.device, channel: Any, requests: Iterator[int], meter: PeakMeter) -> None:
        self.device, self.channel, self.requests, self.meter = device, channel, requests, meter
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the request. The step's batch is loaded already, so loading is not measured."""
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
        send(self.channel, {"seconds": seconds, "extra_bytes": self.meter.extra_bytes})


class OrderedTrainer(Trainer):
    """A trainer that takes the rows in the given order."""

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)


def build_trainer(
    model: PaddedModel, batches: list[list[dict[str, Any]]], answers: list[int], rows: int, folder: str
) -> OrderedTrainer:
    """Return a trainer of one step for each global batch, ``rows`` rows a micro-batch."""
    is_cuda = torch.cuda.is_available()
    dataset = [row for batch in batches for row in sorted(batch, key=lambda row: len(row["ids"]))]
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=max(len(batches[0]) // rows, 1),
        max_steps=len(batches),
        learning_rate=1e-4,
        use_cpu=not is_cuda,
        bf16=is_cuda,
        optim="adamw_torch_fused" if is_cuda else "adamw_torch",
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
        return batch if batch["slots"] else {name: value for name, value in batch.items() if name != "slots"}

    return OrderedTrainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=collate,
        preprocess_logits_for_metrics=lambda logits, labels: _pick_answers(logits, labels, answers),
    )


def _pick_answers(logits: torch.Tensor, labels: torch.Tensor, answers: list[int]) -> torch.Tensor:
    """Return the answers' logits at the position before the label."""
    last = (labels >= 0).int().argmax(dim=1) - 1
    return logits[torch.arange(len(logits)), last][:, answers]


def serve_hf_trainer(
    model: PaddedModel,
    rows: dict[str, Any],
    rows_per_micro_batch: int,
    order: list[int],
    meter: PeakMeter,
    device: torch.device,
    channel: Any,
) -> None:
    """Make a step, or a prediction if the model is in evaluation mode, for each request.

    Args:
        model: of the peers.
        rows: as ``write_rows`` wrote them.
        rows_per_micro_batch: of the trainer.
        order: batches in the order of their requests.
        meter: started when the weights were loaded.
        device: of the model.
        channel: where answers go.
    """
    batches, answers = rows["batches"], rows["answer_ids"]
    with tempfile.TemporaryDirectory() as folder:
        ready = {"rows_per_micro_batch": rows_per_micro_batch}
        if model.training:
            trainer = build_trainer(model, [batches[number] for number in order], answers, rows_per_micro_batch, folder)
            requests = read_requests(channel)
            trainer.add_callback(StepOnRequest(device, channel, requests, meter))
            send(channel, ready)
            trainer.train()
            next(requests, None)  # wait for the end
            return
        trainers = [build_trainer(model, [batch], answers, rows_per_micro_batch, folder) for batch in batches]

        def predict(number: int) -> None:
            trainers[number].predict(trainers[number].train_dataset)

        send(channel, ready)
        answer_requests(predict, device, meter, channel)


def try_row_counts(model: PaddedModel, rows: dict[str, Any], device: torch.device) -> dict[int, float]:
    """Return the seconds of the batch with the longest row by rows per micro-batch, without those that do not fit."""
    batches, answers = rows["batches"], rows["answer_ids"]
    longest = max(batches, key=lambda batch: max(len(row["ids"]) for row in batch))
    counts = [count for count in TRIAL_ROWS[device.type] if not model.training or len(longest) % count == 0]

    def try_count(count: int, folder: str) -> float | None:
        trainer = build_trainer(model, [longest], answers, count, folder)

        def run(_: int) -> None:
            trainer.train() if model.training else trainer.predict(trainer.train_dataset)

        try:
            # On a GPU the first pass of each count allocates memory and chooses kernels.
            return min(measure(run, 0, device)["seconds"] for _ in range(2 if device.type == "cuda" else 1))
        except RuntimeError as error:
            # cuBLAS raises no OutOfMemoryError when nothing is left for its workspace.
            if not isinstance(error, torch.cuda.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
                raise
        torch.cuda.empty_cache()  # outside of the handler, whose error keeps the failed pass's tensors
        return None

    with tempfile.TemporaryDirectory() as folder:
        try_count(counts[0], folder)  # warms up
        seconds = {count: try_count(count, folder) for count in counts}
    return {count: value for count, value in seconds.items() if value is not None}
