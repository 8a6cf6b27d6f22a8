"""Running a stage: from what the steps before left, or its own last checkpoint, to its product and summary."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from collm_dist import monitoring
from collm_dist.config import Config, StageConfig
from collm_dist.data.prompts.preview import render_example
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.local_shards import build_local_shards
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.llm.lora import merge_adapter, save_adapter
from collm_dist.llm.slot_mapping import save_mapper
from collm_dist.runs.atomic_files import compute_file_hash, explain_disk_errors, sync_files, write_json
from collm_dist.runs.fingerprints import is_step_current
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.checkpoints import load_last_checkpoint
from collm_dist.tuning.deepspeed_config import build_deepspeed_config
from collm_dist.tuning.engine import (
    TrainingState,
    TuningEngine,
    get_rank,
    get_world_size,
    init_distributed,
    run_on_first,
)
from collm_dist.tuning.item_map import write_item_map
from collm_dist.tuning.loop import TuningLoop, count_total_steps, load_valid_rows
from collm_dist.tuning.stages import (
    LoadedStage,
    Stage,
    Stage2,
    StageName,
    build_stage,
    compute_stage_fingerprint,
    get_stage,
    get_stage_config,
    load_llm,
)
from collm_dist.tuning.token_budget import find_token_budget
from collm_dist.tuning.warm_start import explain_refresh, start_mapping, take_stage1

VALID_BATCH_ROWS = 512


def run_stage(
    config: Config, run_dir: RunDir, name: StageName, force: bool = False, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Train a stage, unless it is done, from its last checkpoint if there is one. Called on every process.

    Args:
        config, run_dir: the experiment.
        name: of the stage.
        force: redo it from the start even if it is done.
        stop: set on any process, it ends the training of all after the step, with a checkpoint; so do SIGTERM and
            SIGUSR1 in a main thread.

    Returns:
        The stage's summary.

    Raises:
        CollmError: see ``TuningLoop.run`` and ``build_stage``.
    """
    monitoring.check_textfile_dir(config.monitoring.prometheus_dir)
    fingerprint = compute_stage_fingerprint(config, run_dir, name)
    folder = run_dir.step_dir(name)
    if not force and is_step_current(run_dir, name, fingerprint):
        if get_rank() == 0:
            print(f"{name}: done already ({folder})")
        return run_dir.read_record(name)
    device = init_distributed(config.cluster.collective_timeout_minutes)
    if name == "stage1" and not force and explain_refresh(config, run_dir, fingerprint) is None:
        run_on_first(lambda: take_stage1(config, run_dir, fingerprint))
        return _announce(run_dir.read_record(name))
    _clear(run_dir, name, force)
    loaded = build_stage(config, run_dir, get_stage(config, name), device)
    if loaded.model.slot_mapper is not None:
        start_mapping(config, loaded.model.slot_mapper)
    loop = build_loop(config, run_dir, name, loaded, fingerprint, stop)
    if get_rank() == 0:
        example = next(loop.train_order.iter_batches())
        loop.logger.log_text("prompt", render_example(loaded.collator, example, loaded.backbone.tokenizer))
    try:
        loop.run()
    finally:
        loop.profiler.stop()
        loop.logger.close()
    run_on_first(lambda: _finish(config, run_dir, name, loop, loaded))
    return run_dir.read_record(name)


def _announce(record: dict[str, Any]) -> dict[str, Any]:
    if get_rank() == 0:
        print(f"stage1: taken from {record['taken_from']}, until stage1.refresh_every_days have passed", flush=True)
    return record


def _finish(config: Config, run_dir: RunDir, name: StageName, loop: TuningLoop, loaded: LoadedStage) -> None:
    """Write what a stage leaves behind and, last of all, its summary."""
    folder, progress = run_dir.step_dir(name), loop.progress
    with explain_disk_errors(folder):
        product = _write_product(config, folder, get_stage(config, name), loaded, loop.best_weights)
        if name == "stage2" and config.monitoring.tensorboard and config.monitoring.projector_items:
            most = config.monitoring.projector_items
            write_item_map(folder / "tensorboard", run_dir.step_dir("data"), loaded, loop.best_weights, most)
    summary = {
        "stage": name,
        "global_steps": progress.global_step,
        "best_valid": {**progress.best_metrics, "step": progress.best_step},
        "last_train": {"loss": progress.last_loss},
        "nonfinite_skips": progress.nonfinite_skips,
        "throughput": {"samples_per_second": loop.trained_rows / max(loop.train_seconds, 1e-9)},
        "memory": {"peak_gib": monitoring.measure_peak_gib(loaded.device)},
        "trainable_parameters": sum(one.numel() for one in loop.best_weights.values()),
        "world_size": get_world_size(),
        "train_rows": loop.train_order.num_rows,
        "trained_until": load_manifest(run_dir.step_dir("data")).splits["train"].last_timestamp,
        "split_contexts": loop.train_order.num_split_contexts,
        "max_tokens_per_micro_batch": loop.max_tokens,
        "dropped_history_items": loaded.collator.num_dropped_history,
        "fingerprint": loop.fingerprint,
        "content_hash": compute_file_hash(product),
    }
    write_json(run_dir.record_path(name), summary)
    _print_summary(name, summary)


def build_loop(
    config: Config,
    run_dir: RunDir,
    name: StageName,
    loaded: LoadedStage,
    fingerprint: Mapping[str, Any],
    stop: threading.Event | None = None,
) -> TuningLoop:
    """Wrap a stage's model with DeepSpeed and return the loop that trains it from its last checkpoint, if there is one.

    Args:
        config, run_dir, name: which stage of which run.
        loaded: what ``build_stage`` returned.
        fingerprint: of the stage; a checkpoint made under another one is refused.
        stop: see ``run_stage``.
    """
    settings, folder = get_stage_config(config, get_stage(config, name)), run_dir.step_dir(name)
    train_order, valid_order = build_orders(config, run_dir, settings)
    checkpoint = load_last_checkpoint(folder / "checkpoints", fingerprint)
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
        mask_probability=config.mapping.mask_probability if name == "stage2" else 0.0,
        folder=folder / "checkpoints",
        fingerprint=fingerprint,
        progress=checkpoint.progress,
        best_weights=checkpoint.best_weights if get_rank() == 0 else {},
        logger=logger,
        profiler=profiler,
        log_every_steps=config.monitoring.log_every_steps,
        timeout_minutes=config.cluster.collective_timeout_minutes,
        stop=stop or threading.Event(),
    )


def _build_monitors(
    config: Config, folder: Path, start_step: int, total_steps: int
) -> tuple[monitoring.RunLogger, monitoring.StepProfiler]:
    """Return what shows the training; the first process alone shows anything."""
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
    budget = find_token_budget(loaded.model, loaded.collator, block, loaded.device)
    if get_rank() == 0:
        print(
            f"max_tokens_per_micro_batch: {budget.tokens:,} (auto: {budget.bytes_per_token / 2**20:.2f} MiB a token, "
            f"{budget.free_bytes / 2**30:.1f} GiB free)"
        )
    return budget.tokens


def _build_engine(
    config: Config, settings: StageConfig, loaded: LoadedStage, state: TrainingState | None, folder: Path
) -> TuningEngine:
    """Wrap a stage's model and save the effective DeepSpeed configuration beside its checkpoints."""
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


def _clear(run_dir: RunDir, name: StageName, force: bool) -> None:
    """Take back the record of a stage that is to be redone, and with force its checkpoints too."""
    if get_rank() == 0:
        run_dir.withdraw(name)
        if force:
            shutil.rmtree(run_dir.step_dir(name), ignore_errors=True)
        (run_dir.step_dir(name) / "checkpoints").mkdir(parents=True, exist_ok=True)
    if get_world_size() > 1:
        dist.barrier()


def build_orders(config: Config, run_dir: RunDir, settings: StageConfig) -> tuple[GlobalOrder, GlobalOrder]:
    """Return a stage's training and validation rows in their order."""
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


def _write_product(config: Config, folder: Path, stage: Stage, loaded: LoadedStage, best: dict[str, Tensor]) -> Path:
    """Write what the stage leaves behind and return the file that stands for it."""
    if isinstance(stage, Stage2):
        return save_mapper(folder / "mapping.safetensors", best)
    source = loaded.backbone.source
    weights = {name.removeprefix("backbone."): value for name, value in best.items()}
    save_adapter(loaded.adapter, folder / "adapter", weights, source.public_name, source.revision)
    loaded.backbone.tokenizer.save_pretrained(str(folder / "adapter"))
    # From the files, on the CPU: the model in use may be partitioned or quantized.
    plain = load_llm(config.llm, may_quantize=False)
    merge_adapter(plain.model, folder / "adapter").save_pretrained(str(folder / "merged"))
    loaded.backbone.tokenizer.save_pretrained(str(folder / "merged"))
    for part in ("adapter", "merged"):
        sync_files(folder / part)
    return folder / "adapter" / "adapter_model.safetensors"


def _print_summary(name: str, summary: dict[str, Any]) -> None:
    best = summary["best_valid"]
    shown = "  ".join(f"{key} {best[key]:.4f}" for key in ("auc", "uauc", "logloss") if best.get(key) is not None)
    print(
        f"{name}: {summary['global_steps']} steps, best at step {best['step']}: valid {shown}; "
        f"{summary['throughput']['samples_per_second']:.2f} samples/s, {summary['memory']['peak_gib']:.2f} GiB"
    )
