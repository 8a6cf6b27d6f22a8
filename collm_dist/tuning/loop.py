"""Training loop of both stages."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collm_dist import monitoring
from collm_dist.config import StageConfig
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.prompts.slot_codes import Masking
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.distributed import explain_lost_workers, get_rank, get_world_size, run_on_rank_0, sum_over_workers
from collm_dist.errors import LaunchError, NonFiniteError, Preempted
from collm_dist.random_keys import hash_integers
from collm_dist.tuning.checkpoints import Checkpoint, Progress, save_checkpoint
from collm_dist.tuning.engine import TuningEngine
from collm_dist.tuning.learning_rate import compute_learning_rate
from collm_dist.tuning.losses import LOSS_TAGS, LossWeights, StepLoss
from collm_dist.tuning.nonfinite import describe_nonfinite
from collm_dist.tuning.scoring import score_batches
from collm_dist.tuning.selection import build_selection
from collm_dist.tuning.step_batches import StepBatch, iter_step_batches
from collm_dist.tuning.validation import ValidRows, compute_metrics
from collm_dist.tuning.watchdog import Watchdog


@dataclass(frozen=True)
class Agreement:
    """Result of the all-reduce of a step, the same on every rank.

    Attributes:
        loss: loss of the global batch.
        finite: whether the loss and all gradients are finite on every rank.
        stop: whether a stop was requested on any rank.
        save: whether a checkpoint is due by time.
        terms: terms of the loss, see ``StepLoss``.
    """

    loss: float
    finite: bool
    stop: bool
    save: bool
    terms: list[float]


class TuningLoop:
    """Training of one stage, from its current position to its end."""

    def __init__(
        self,
        engine: TuningEngine,
        collator: PromptCollator,
        scoring_collator: PromptCollator,
        train_order: GlobalOrder,
        valid_rows: ValidRows,
        stage: StageConfig,
        *,
        max_tokens: int,
        seed: int,
        mask_probability: float,
        folder: Path,
        fingerprint: Mapping[str, Any],
        progress: Progress,
        best_weights: dict[str, Tensor],
        first_weights: dict[str, Tensor],
        logger: monitoring.RunLogger,
        profiler: monitoring.StepProfiler,
        log_every_steps: int,
        timeout_minutes: float,
        stop: threading.Event,
    ) -> None:
        """Put the parts together.

        Args:
            engine: the wrapped model.
            collator, scoring_collator: lay out the prompts for training and for validation.
            train_order, valid_rows: the rows.
            stage: the stage's config section.
            max_tokens: most tokens of a micro-batch.
            seed: seed of dropout and masking.
            mask_probability: share of slots whose vector is hidden in training.
            folder: checkpoint folder.
            fingerprint: the stage's fingerprint.
            progress, best_weights: position to resume from; see ``Checkpoint``.
            first_weights: weights before training, from which a guard starts without an anchor; else empty.
            logger, profiler: metrics, and the trace of selected steps.
            log_every_steps: steps between logged points.
            timeout_minutes: longest time without a completed step or validation batch before the job is ended.
            stop: set on any rank, it ends training on all ranks after the current step, with a checkpoint.
        """
        self.engine, self.collator, self.scoring_collator = engine, collator, scoring_collator
        self.train_order, self.valid_rows = train_order, valid_rows
        self.stage, self.max_tokens, self.seed, self.mask_probability = stage, max_tokens, seed, mask_probability
        self.folder, self.fingerprint = folder, fingerprint
        self.progress, self.best_weights, self.first_weights = progress, best_weights, first_weights
        self.logger, self.profiler, self.log_every_steps = logger, profiler, log_every_steps
        self.total_steps = count_total_steps(stage, train_order)
        self.loss_weights = LossWeights.of(stage, scores_titles=collator.scores_titles)
        self.selection = build_selection(stage)
        self.trained_rows, self.train_seconds = 0, 0.0
        self._stop, self._saved_at = stop, time.monotonic()
        self._window, self._is_validating = _Window(), False
        self._watchdog = Watchdog(folder.parent, 60 * timeout_minutes, self._describe_position)

    def run(self) -> Progress:
        """Train until the last step, or until validation has not improved for ``early_stop_patience`` validations.

        Raises:
            NonFiniteError: the loss or a gradient is not finite.
            Preempted: a stop was requested.
            KeyboardInterrupt: Ctrl-C; the first one ends training after the current step, with a checkpoint.
            DiskError: a checkpoint cannot be written.
            LaunchError: the GPU is out of memory.
            WorkerLostError: a peer has died or does not answer.
        """
        self._saved_at = time.monotonic()
        try:
            with (
                explain_lost_workers(self._describe_position),
                self._watchdog,
                _stop_on_signals(self._stop) as received,
            ):
                try:
                    self._train()
                except Preempted as error:
                    if signal.SIGINT in received:
                        raise KeyboardInterrupt(str(error)) from None
                    raise
        except torch.cuda.OutOfMemoryError as error:
            raise LaunchError(
                f"CUDA is out of memory at step {self.progress.global_step}. Lower max_tokens_per_micro_batch of this "
                "stage (results stay the same), set llm.activation_checkpointing=true, or shard the frozen weights "
                f"with cluster.zero_stage=3. ({error})"
            ) from error
        return self.progress

    def _train(self) -> None:
        steps_per_epoch = self.train_order.steps_per_epoch
        window = self._window
        if self._is_validation_due():
            self._validate(self.progress.global_step)
        window.restart()
        while not self.progress.is_finished and self.progress.global_step < self.total_steps:
            epoch, start = divmod(self.progress.global_step, steps_per_epoch)
            wait_started = time.perf_counter()
            for step_batch in self.iter_epoch(epoch, start):
                window.wait_seconds += time.perf_counter() - wait_started
                with self.profiler.watch(self.progress.global_step + 1):
                    agreement = self.train_step(step_batch)
                self._watchdog.beat()
                step = self.progress.global_step
                is_last = step == self.total_steps
                if step % self.log_every_steps == 0 or is_last:
                    self._log(window)
                if agreement.stop:  # at once: the scheduler may not wait for a validation
                    self._save()
                    raise Preempted(f"stopped on request after step {step}; run the same command again to resume")
                if self._is_validation_due():
                    self._validate(step)
                    window.restart()
                self.progress.is_finished |= is_last
                if agreement.save or self.progress.is_finished or step % self.stage.checkpoint_every_steps == 0:
                    self._save()
                if self.progress.is_finished:
                    return
                wait_started = time.perf_counter()

    def iter_epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """Return an epoch's global batches, from one of its steps on, prefetched."""
        masking = Masking(self.mask_probability, self.seed, epoch)
        blocks, keep_groups = self.train_order.iter_batches(epoch, start_step), self.loss_weights.keep_groups
        return iter_step_batches(
            blocks, self.collator, self.max_tokens, self.engine.device, masking, keep_groups=keep_groups
        )

    def train_step(self, step_batch: StepBatch) -> Agreement:
        """Make one update, unless the loss or a gradient is not finite.

        Raises:
            NonFiniteError: the loss or a gradient is not finite and the step may not be skipped; nothing was updated.
        """
        started = time.perf_counter()
        window, block, micro_batches = self._window, step_batch.block, step_batch.micro_batches
        finite_flags: list[Tensor] = []
        step, rank, world_size = self.progress.global_step, get_rank(), get_world_size()
        dropout_key = int(hash_integers(self.seed, step) >> np.uint64(1))
        self.engine.set_training(True)
        step_loss = StepLoss(self.loss_weights, step_batch, self.engine.device)
        for index, host_batch in enumerate(micro_batches):
            batch = host_batch.to(self.engine.device)
            # The backbone's own random draws depend only on the position, so a resumed run draws the same.
            torch.manual_seed(int(hash_integers(self.seed, step, rank, index) >> np.uint64(1)))
            scores = self.engine(batch, dropout_key, self.loss_weights.llm is not None)
            loss = step_loss.add(scores, batch, host_batch)
            # DeepSpeed averages over ranks, but the ranks' losses are parts of a sum: undo the division.
            self.engine.backward(loss * world_size, is_last=index == len(micro_batches) - 1)
            finite_flags.append(self.engine.take_finite())
            window.tokens += batch.num_tokens
        agreement = self._agree(step_loss, torch.stack(finite_flags).all())
        if not agreement.finite:
            self._skip_step(step_batch, finite_flags)
        learning_rate = compute_learning_rate(
            step,
            peak=self.stage.learning_rate,
            warmup_steps=self.stage.warmup_steps,
            total_steps=self.total_steps,
            final_share=self.stage.final_learning_rate_share,
        )
        norm = self.engine.step(learning_rate)
        if norm is None and agreement.finite:  # finite on every rank, but not in their sum
            self._skip_step(step_batch, [torch.ones(())] * len(micro_batches))
        if norm is not None:
            window.grad_norm, window.learning_rate, window.steps = norm, learning_rate, window.steps + 1
            window.losses = window.losses + np.array([agreement.loss, *agreement.terms])
            window.rows += block.num_targets
            self.progress.last_loss = agreement.loss
            self.trained_rows += block.num_targets
        self.progress.global_step += 1
        self.train_seconds += time.perf_counter() - started
        self.logger.advance(self.progress.global_step, {"loss": f"{agreement.loss:.4f}"})
        return agreement

    def _agree(self, step_loss: StepLoss, finite: Tensor) -> Agreement:
        """All-reduce the loss and the flags of a step: its only small collective."""
        minutes = (time.monotonic() - self._saved_at) / 60
        # By rank 0's clock alone, because clocks differ.
        save_due = get_rank() == 0 and minutes >= self.stage.checkpoint_every_minutes
        flags = [torch.full_like(step_loss.total, float(flag)) for flag in (self._stop.is_set(), save_due)]
        values = torch.stack([(~finite).float(), *flags, *torch.nan_to_num(step_loss.list_values())])
        num_nonfinite, stop, save, loss, *terms = sum_over_workers(values).tolist()
        return Agreement(loss, finite=num_nonfinite == 0, stop=stop > 0, save=save > 0, terms=terms)

    def _skip_step(self, step_batch: StepBatch, finite_flags: list[Tensor]) -> None:
        """Count a step that is not finite, on all ranks, and warn.

        Raises:
            NonFiniteError: the step may not be skipped.
        """
        fault = describe_nonfinite(self.progress.global_step, step_batch.block, step_batch.micro_batches, finite_flags)
        if self.stage.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{fault}. Lower the learning rate, raise warmup_steps, set max_grad_norm, or use llm.dtype=float32; "
                "on_nonfinite=skip skips such steps"
            )
        if self.progress.nonfinite_skips == self.stage.max_nonfinite_skips:
            raise NonFiniteError(
                f"{fault}. max_nonfinite_skips={self.stage.max_nonfinite_skips} steps were skipped before"
            )
        self.progress.nonfinite_skips += 1
        if get_rank() == 0:
            count = f"{self.progress.nonfinite_skips} of at most {self.stage.max_nonfinite_skips}"
            logging.getLogger(__name__).warning("%s. Skipped (%s)", fault, count)

    def _is_validation_due(self) -> bool:
        step = self.progress.global_step
        is_due = step % self.stage.eval_every_steps == 0 or step == self.total_steps
        return is_due and step > self.progress.validated_step

    def _describe_position(self) -> str:
        stage, step = self.folder.parent.name, self.progress.global_step
        return f"{stage}, validation after step {step}" if self._is_validating else f"{stage}, step {step}"

    def _validate(self, step: int) -> None:
        if self.first_weights and self.progress.guard_start is None:  # not before the first step, which it would delay
            with self.engine.computing_with(self.first_weights):
                self._judge(0, self.first_weights)
        self._judge(step)
        self.progress.validated_step = step
        self.progress.is_finished |= self.progress.bad_validations >= self.stage.early_stop_patience

    def _judge(self, step: int, weights: dict[str, Tensor] | None = None) -> None:
        """Validate the model, and keep its weights (by default the engine's) if it is the best so far."""
        self._is_validating = True
        metrics = self.compute_valid_metrics()
        self._is_validating = False
        self.logger.log(step, {f"valid/{name}": value for name, value in metrics.items() if value is not None})
        if self.selection.judge(self.progress, step, metrics):
            best = weights or self.engine.export_state(with_moments=False).weights
            self.best_weights = best if get_rank() == 0 else {}

    def compute_valid_metrics(self) -> dict[str, float | None]:
        """Score the validation rows. Collective; the metrics are the same on every rank."""
        rows = self.valid_rows
        if self.progress.global_step == 0 and self.collator.has_anchors:
            # The gain is still 0, so the scores equal the anchors to the bit.
            return compute_metrics(rows, rows.score(self.collator.compute_anchors), self.selection.names)
        self.engine.set_training(False)
        num_scored, share = 0, max(1, rows.order.num_rows // get_world_size())

        def report(num_rows: int) -> None:
            nonlocal num_scored
            self._watchdog.beat()
            num_scored += num_rows
            self.logger.note(f"validating, {min(1.0, num_scored / share):.0%}")

        row_ids, scores = score_batches(
            self.engine,
            self.scoring_collator,
            rows.order,
            self.max_tokens,
            self.engine.device,
            on_batch=report,
        )
        assert np.array_equal(row_ids, rows.row_id)
        if num_bad := int((~np.isfinite(scores)).sum()):
            raise NonFiniteError(
                f"validation after step {self.progress.global_step}: {num_bad:,} of {len(scores):,} scores are not "
                "finite, so the weights have diverged; the checkpoints before it are kept"
            )
        return compute_metrics(rows, scores, self.selection.names)

    def _save(self) -> None:
        checkpoint = Checkpoint(self.engine.export_state(), self.best_weights, self.progress)
        run_on_rank_0(lambda: save_checkpoint(self.folder, checkpoint, self.fingerprint))
        self._saved_at = time.monotonic()
        self._watchdog.beat()

    def _log(self, window: _Window) -> None:
        if window.steps == 0:  # all were skipped
            return
        seconds = time.perf_counter() - window.started
        self.logger.log(
            self.progress.global_step,
            {
                **dict(zip(LOSS_TAGS, (window.losses / window.steps).tolist(), strict=False)),
                monitoring.LEARNING_RATE: window.learning_rate,
                monitoring.GRAD_NORM: float(window.grad_norm),
                monitoring.SAMPLES_PER_SECOND: window.rows / seconds,
                monitoring.TOKENS_PER_SECOND: window.tokens / seconds,
                monitoring.STEP_SECONDS: seconds / window.steps,
                monitoring.DATA_WAIT_SHARE: window.wait_seconds / seconds,
                monitoring.PEAK_MEMORY: monitoring.measure_peak_gib(self.engine.device),
                monitoring.TOTAL_MEMORY: monitoring.measure_total_gib(self.engine.device),
            },
        )
        window.restart()


@contextmanager
def _stop_on_signals(stop: threading.Event) -> Iterator[set[int]]:
    """Set an event on SIGTERM, SIGUSR1 and the first SIGINT, and yield the numbers of the signals received.

    A second SIGINT interrupts at once. Only a process's main thread can handle signals.
    """
    received: set[int] = set()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def request_stop(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if number in received:
                raise KeyboardInterrupt
            if get_rank() == 0:
                print("\nstopping with a checkpoint; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
        received.add(number)
        stop.set()

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = [signal.signal(number, request_stop) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


class _Window:
    """Sums since the last logged point."""

    def __init__(self) -> None:
        self.learning_rate = 0.0
        self.grad_norm: Tensor | float = 0.0
        self.restart()

    def restart(self) -> None:
        self.started = time.perf_counter()
        self.losses: Any = 0.0
        self.wait_seconds = 0.0
        self.steps = self.rows = self.tokens = 0


def count_total_steps(stage: StageConfig, order: GlobalOrder) -> int:
    """Return the steps of a stage without early stopping."""
    steps = stage.num_epochs * order.steps_per_epoch
    return min(steps, stage.max_steps) if stage.max_steps is not None else steps
