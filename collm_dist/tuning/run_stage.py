"""A tuning stage from start to finish: skip, resume or train; then product and summary."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from collm_dist import monitoring
from collm_dist.anchor import prepare_anchor
from collm_dist.config import Config, StageConfig
from collm_dist.data.prompts.prompt_preview import render_example
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.local_shards import build_local_shards
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.distributed import get_rank, get_world_size, run_on_rank_0, sum_over_workers, wait_for_all
from collm_dist.phases import show_phase
from collm_dist.runs.atomic_files import compute_file_hash, explain_disk_errors, write_json
from collm_dist.runs.code_trust import keep_trust
from collm_dist.runs.file_hashes import hash_products
from collm_dist.runs.fingerprints import is_step_current
from collm_dist.runs.forced_redo import has_begun, note_begun
from collm_dist.runs.run_dir import RunDir, StageName, clear_checkpoints
from collm_dist.tuning.checkpoints import load_last_checkpoint
from collm_dist.tuning.deepspeed_config import build_deepspeed_config
from collm_dist.tuning.engine import TrainingState, TuningEngine, copy_trainable, init_distributed
from collm_dist.tuning.loaded_stage import LoadedStage
from collm_dist.tuning.loop import TuningLoop, count_total_steps
from collm_dist.tuning.losses import LossWeights
from collm_dist.tuning.stage import Stage, get_stage
from collm_dist.tuning.token_budget import find_token_budget
from collm_dist.tuning.validation import load_valid_rows

VALID_BATCH_ROWS = 512


def run_stage(
    config: Config, run_dir: RunDir, name: StageName, force: bool = False, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Train a stage unless it is done, from its last checkpoint if there is one. Collective.

    Args:
        config, run_dir: the experiment.
        name: the stage.
        force: retrain from the start even if the stage is done; a redo that was interrupted resumes (``track_redo``).
        stop: set on any rank, it ends training on all ranks after the current step, with a checkpoint. In a main
            thread SIGTERM and SIGUSR1 set it.

    Returns:
        The stage's summary.

    Raises:
        CollmError: see ``TuningLoop.run`` and ``Stage.build``.
    """
    monitoring.check_textfile_dir(config.monitoring.prometheus_dir)
    stage, folder = get_stage(config, name), run_dir.step_dir(name)
    fingerprint = compute_step_fingerprint(config, run_dir, name)
    is_fresh = force and not _has_begun(config, run_dir, name, fingerprint)
    if not is_fresh and is_step_current(run_dir, name, fingerprint):
        if get_rank() == 0:
            prepare_anchor(config, run_dir)  # a stage that was linked from another run has its anchor there
            print(f"{name}: done already ({folder})")
        return run_dir.read_record(name)
    device = init_distributed(config.cluster.collective_timeout_minutes)
    run_on_rank_0(lambda: prepare_anchor(config, run_dir))
    if not force and stage.take_over(run_dir, fingerprint):
        run_on_rank_0(lambda: keep_trust(config, run_dir, name))
        return run_dir.read_record(name)
    _clear(run_dir, name, fingerprint if is_fresh else None)
    with show_phase(f"{name}: loading the model"):
        loaded = stage.build(run_dir, device)
        stage.warm_start(loaded)
    loop = build_loop(config, run_dir, stage, loaded, fingerprint, stop)
    if get_rank() == 0:
        example = next(loop.train_order.iter_batches())
        loop.logger.log_text("prompt", render_example(loaded.collator, example, loaded.backbone.tokenizer))
    try:
        loop.run()
    finally:
        loop.profiler.stop()
        loop.logger.close()
    dropped = _count_dropped_items(loaded)
    run_on_rank_0(lambda: _finish(run_dir, stage, loop, loaded, dropped))
    run_on_rank_0(lambda: keep_trust(config, run_dir, name))
    return run_dir.read_record(name)


def _count_dropped_items(loaded: LoadedStage) -> dict[str, int]:
    """Return the items that the prompts of all workers had no room for, by list of the prompt. Collective."""
    collator = loaded.collator
    counts = {"dropped_history_items": collator.num_dropped_history}
    if collator.template.has("<RatedTitleList>"):
        counts["dropped_rated_items"] = collator.num_dropped_ratings
    if collator.template.has("<DislikedTitleList>"):
        counts["dropped_disliked_items"] = collator.num_dropped_dislikes
    sums = sum_over_workers(torch.tensor(list(counts.values()), device=loaded.device))
    return dict(zip(counts, sums.tolist(), strict=True))


def _finish(run_dir: RunDir, stage: Stage, loop: TuningLoop, loaded: LoadedStage, dropped: Mapping[str, int]) -> None:
    """Write the stage's product and, last, its summary."""
    progress = loop.progress
    with explain_disk_errors(run_dir.step_dir(stage.name)):
        product = stage.save_product(run_dir, loaded, loop.best_weights)
    summary = {
        "stage": stage.name,
        "global_steps": progress.global_step,
        "best_valid": {**progress.best_metrics, "step": progress.best_step},
        **({"guard_refusals": progress.guard_refusals} if stage.settings.guard_metric is not None else {}),
        "last_train": {"loss": progress.last_loss},
        "nonfinite_skips": progress.nonfinite_skips,
        "throughput": {"samples_per_second": loop.trained_rows / max(loop.train_seconds, 1e-9)},
        "memory": {"peak_gib": monitoring.measure_peak_gib(loaded.device)},
        "trainable_parameters": sum(weight.numel() for weight in loop.best_weights.values()),
        "world_size": get_world_size(),
        "train_rows": loop.train_order.num_rows,
        "trained_until": load_manifest(run_dir.step_dir("data")).splits["train"].last_timestamp,
        "split_contexts": loop.train_order.num_split_contexts,
        "max_tokens_per_micro_batch": loop.max_tokens,
        **dropped,
        "fingerprint": loop.fingerprint,
        "content_hash": compute_file_hash(product),
        "files": hash_products(run_dir.step_dir(stage.name)),
    }
    run_dir.write_record(stage.name, summary)
    _print_summary(stage.name, summary)


def build_loop(
    config: Config,
    run_dir: RunDir,
    stage: Stage,
    loaded: LoadedStage,
    fingerprint: Mapping[str, Any],
    stop: threading.Event | None = None,
) -> TuningLoop:
    """Wrap a stage's model with DeepSpeed and return the loop that trains it from its last checkpoint, if any.

    Args:
        config, run_dir: the experiment.
        stage: the stage.
        loaded: its model, as ``Stage.build`` returned it.
        fingerprint: of the stage; a checkpoint with another fingerprint is refused.
        stop: see ``run_stage``.
    """
    settings, folder = stage.settings, run_dir.step_dir(stage.name)
    train_order, valid_order = build_orders(config, run_dir, settings)
    checkpoint = load_last_checkpoint(folder / "checkpoints", fingerprint)
    first_weights = {}
    if config.anchor.kind is not None and checkpoint.progress.global_step == 0:
        # The anchor itself is the first candidate for the best checkpoint. Its validation needs no language model.
        checkpoint.progress.validated_step = -1
    elif config.anchor.kind is None and settings.guard_metric is not None:
        first_weights = copy_trainable(loaded.model)  # a guard starts from the untrained model
    logger, profiler = _build_monitors(
        config, folder, checkpoint.progress.global_step, count_total_steps(settings, train_order)
    )
    max_tokens = _resolve_max_tokens(settings, loaded, train_order)
    return TuningLoop(
        _build_engine(config, settings, loaded, checkpoint.state, folder),
        loaded.collator,
        loaded.scoring_collator,
        train_order,
        load_valid_rows(valid_order),
        settings,
        max_tokens=max_tokens,
        seed=config.run.seed,
        mask_probability=stage.mask_probability,
        folder=folder / "checkpoints",
        fingerprint=fingerprint,
        progress=checkpoint.progress,
        best_weights=checkpoint.best_weights if get_rank() == 0 else {},
        first_weights=first_weights,
        logger=logger,
        profiler=profiler,
        log_every_steps=config.monitoring.log_every_steps,
        timeout_minutes=config.cluster.collective_timeout_minutes,
        stop=stop or threading.Event(),
    )


def _build_monitors(
    config: Config, folder: Path, start_step: int, total_steps: int
) -> tuple[monitoring.RunLogger, monitoring.StepProfiler]:
    """Return logger and profiler; only those of rank 0 write."""
    settings, is_main = config.monitoring, get_rank() == 0
    textfile = None
    if is_main and settings.prometheus_dir is not None:
        textfile = monitoring.TrainingTextfile(
            Path(settings.prometheus_dir), run=config.run.dir, step=folder.name, total_steps=total_steps
        )
    logger = monitoring.RunLogger(
        folder,
        is_main=is_main,
        tensorboard=settings.tensorboard,
        progress_bar=settings.progress_bar,
        start_step=start_step,
        total_steps=total_steps,
        textfile=textfile,
    )
    steps = settings.profile_steps if is_main else None
    return logger, monitoring.StepProfiler(folder / "profile", steps, start_step=start_step, total_steps=total_steps)


def _resolve_max_tokens(settings: StageConfig, loaded: LoadedStage, train_order: GlobalOrder) -> int:
    if settings.max_tokens_per_micro_batch != "auto":
        return settings.max_tokens_per_micro_batch
    block = next(train_order.iter_batches())
    keep_groups = LossWeights.of(settings, scores_titles=loaded.collator.scores_titles).keep_groups
    budget = find_token_budget(loaded.model, loaded.collator, block, loaded.device, keep_groups=keep_groups)
    if get_rank() == 0:
        print(
            f"max_tokens_per_micro_batch: {budget.tokens:,} (auto: {budget.bytes_per_token / 2**20:.2f} MiB per token, "
            f"{budget.free_bytes / 2**30:.1f} GiB free)"
        )
    return budget.tokens


def _build_engine(
    config: Config, settings: StageConfig, loaded: LoadedStage, state: TrainingState | None, folder: Path
) -> TuningEngine:
    """Wrap the model and write the effective DeepSpeed config to the stage's folder."""
    deepspeed_config = build_deepspeed_config(
        zero_stage=config.cluster.zero_stage,
        bfloat16=loaded.backbone.model.dtype == torch.bfloat16,
        max_grad_norm=settings.max_grad_norm,
        extra=config.cluster.deepspeed_extra,
    )
    if get_rank() == 0:
        write_json(folder / "deepspeed_config.json", deepspeed_config)
    return TuningEngine(
        loaded.model,
        deepspeed_config=deepspeed_config,
        device=loaded.device,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=settings.adam_betas,
        state=state,
    )


def _has_begun(config: Config, run_dir: RunDir, name: StageName, fingerprint: Mapping[str, Any]) -> bool:
    """Return whether the stage's redo was interrupted, as rank 0 finds it. Collective."""
    init_distributed(config.cluster.collective_timeout_minutes)
    return run_on_rank_0(lambda: has_begun(run_dir, name, fingerprint))


def _clear(run_dir: RunDir, name: StageName, redone: Mapping[str, Any] | None) -> None:
    """Withdraw the stage's record before it is trained. Collective.

    Args:
        run_dir, name: the stage.
        redone: fingerprint of a redo from the start, for which the stage's files and checkpoints are deleted too.
    """
    folder = run_dir.step_dir(name)
    checkpoints = folder / "checkpoints"
    if get_rank() == 0:
        run_dir.withdraw(name)
        if redone is not None:
            clear_checkpoints(checkpoints)
            for entry in folder.iterdir() if folder.is_dir() else ():
                if entry.is_file():
                    entry.unlink()
                elif entry != checkpoints:
                    shutil.rmtree(entry, ignore_errors=True)  # on NFS, logs that TensorBoard has open stay
            note_begun(run_dir, name, redone)
        checkpoints.mkdir(parents=True, exist_ok=True)
    wait_for_all()


def build_orders(config: Config, run_dir: RunDir, settings: StageConfig) -> tuple[GlobalOrder, GlobalOrder]:
    """Return the global orders of a stage's training and validation rows."""
    data_dir = run_dir.step_dir("data")
    manifest, local_shards = load_manifest(data_dir), build_local_shards(config, data_dir)
    train = GlobalOrder(
        data_dir,
        manifest,
        "train",
        config.run.seed,
        settings.global_batch_size,
        max_contexts=settings.max_train_contexts,
        local_shards=local_shards,
    )
    valid = GlobalOrder(
        data_dir,
        manifest,
        "valid",
        config.run.seed,
        VALID_BATCH_ROWS,
        max_contexts=settings.max_valid_contexts,
        shuffle=False,
        local_shards=local_shards,
    )
    return train, valid


def _print_summary(name: str, summary: dict[str, Any]) -> None:
    best = summary["best_valid"]
    shown = "  ".join(f"{key} {value:.4f}" for key, value in best.items() if key != "step" and value is not None)
    print(
        f"{name}: {summary['global_steps']} steps, best at step {best['step']}: valid {shown}; "
        f"{summary['throughput']['samples_per_second']:.2f} samples/s, {summary['memory']['peak_gib']:.2f} GiB"
    )
