"""The two stages: what each builds, trains and leaves behind (CoLLM, section 3.3)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist

from collm_dist import monitoring
from collm_dist.artifacts import RunDir, compute_file_hash, is_step_current, write_json
from collm_dist.cf.export import load_cf_model
from collm_dist.config import Config, StageConfig
from collm_dist.data.collate import PromptCollator, build_collator
from collm_dist.data.fingerprints import compute_step_fingerprint
from collm_dist.data.global_order import GlobalOrder
from collm_dist.data.manifest import load_manifest
from collm_dist.data.preview import render_example
from collm_dist.data.prompts import resolve_answer_ids
from collm_dist.data.statistics import PAIR_FEATURES
from collm_dist.errors import ArtifactError
from collm_dist.llm.backbone import Backbone, load_backbone
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.lora import add_lora, merge_adapter, save_adapter
from collm_dist.llm.mapping import SlotMapper, load_mapper, save_mapper
from collm_dist.llm.shared_context import enable_activation_checkpointing
from collm_dist.tuning.checkpointing import Progress, find_last_checkpoint, load_checkpoint
from collm_dist.tuning.deepspeed_config import build_deepspeed_config
from collm_dist.tuning.engine import TrainingState, TuningEngine, get_rank, get_world_size, init_distributed
from collm_dist.tuning.loop import TuningLoop, count_total_steps, load_valid_rows

StageName = Literal["stage1", "stage2"]
VALID_BATCH_ROWS = 512


@dataclass(frozen=True)
class Stage1:
    """LoRA trains, on text-only prompts."""

    name: ClassVar[StageName] = "stage1"


@dataclass(frozen=True)
class Stage2:
    """The mapping trains (and, if asked, the collaborative model), on prompts with slots; the rest is frozen."""

    train_cf: bool = False
    name: ClassVar[StageName] = "stage2"


Stage = Stage1 | Stage2


@dataclass
class LoadedStage:
    """A stage's model, ready to train or to score.

    Attributes:
        model: with its weights whole.
        collator: of its prompts.
        backbone: with tokenizer and source.
        adapter: peft's wrapper in stage 1.
        device: of this process.
    """

    model: CollmModel
    collator: PromptCollator
    backbone: Backbone
    adapter: Any
    device: torch.device


def get_stage(config: Config, name: StageName) -> Stage:
    """Return the stage that a name and the settings mean."""
    return Stage1() if name == "stage1" else Stage2(train_cf=config.stage2.train_cf)


def get_stage_config(config: Config, stage: Stage) -> StageConfig:
    """Return a stage's settings."""
    return config.stage1 if isinstance(stage, Stage1) else config.stage2


def compute_stage_fingerprint(config: Config, run_dir: RunDir, name: StageName) -> dict[str, Any]:
    """Return what a stage depends on: settings, the steps before, and the prompt's text. Cheap."""
    return compute_step_fingerprint(config, run_dir, name)


def build_stage(config: Config, run_dir: RunDir, stage: Stage, device: torch.device) -> LoadedStage:
    """Build a stage's untrained model.

    Raises:
        ConfigError: the prompt, the answers or the backbone do not fit.
        ArtifactError: a step before it is not done.
    """
    llm = config.llm
    backbone = load_backbone(
        llm.backbone,
        llm.revision,
        dtype=llm.dtype,
        attention=llm.attention,
        trust_remote_code=llm.trust_remote_code,
    )
    answers = resolve_answer_ids(backbone.tokenizer, config.prompt.yes, config.prompt.no)
    manifest = load_manifest(run_dir.step_dir("data"))
    adapter, mapper, cf_model = None, None, None
    if isinstance(stage, Stage1):
        collator = build_collator(config, run_dir, backbone.tokenizer, "stage1")
        lora = config.lora
        adapter = add_lora(
            backbone.model,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=lora.target_modules,
            seed=config.run.seed,
        )
    else:
        if config.stage1.enabled:
            backbone = _load_merged(config, run_dir, backbone)
        cf_model = load_cf_model(run_dir, manifest)
        collator = build_collator(
            config,
            run_dir,
            backbone.tokenizer,
            "stage2",
            user_depends_on_target=cf_model.depends_on_target,
            time_cuts=cf_model.fold_starts,
        )
        mapper = _build_mapper(config, collator, backbone.model, cf_model.embedding_dim)
        cf_model.requires_grad_(stage.train_cf)
    train_cf = isinstance(stage, Stage2) and stage.train_cf
    model = CollmModel(backbone.model, answers, config.prompt.score, mapper, cf_model, detach_cf=not train_cf)
    if llm.activation_checkpointing:
        enable_activation_checkpointing(model.decoder)
    return LoadedStage(model.to(device), collator, backbone, adapter, device)


def _load_merged(config: Config, run_dir: RunDir, backbone: Backbone) -> Backbone:
    folder = run_dir.step_dir("stage1") / "merged"
    if not (folder / "config.json").exists():
        raise ArtifactError(f"{folder} is missing: run stage 1 first, or set stage1.enabled=false")
    merged = load_backbone(str(folder), dtype=config.llm.dtype, attention=config.llm.attention)
    return Backbone(merged.model, backbone.tokenizer, backbone.source)


def _build_mapper(config: Config, collator: PromptCollator, model: Any, cf_dim: int) -> SlotMapper:
    template, embeddings = collator.template, model.get_input_embeddings()
    reads_cf = any(template.has(field) for field in ("<UserID>", "<TargetItemID>", "<ItemIDList>"))
    with torch.no_grad():
        sample = embeddings(torch.arange(min(4096, embeddings.num_embeddings)))
    return SlotMapper(
        cf_dim=cf_dim if reads_cf else None,
        pair_dim=len(PAIR_FEATURES) if template.has("<MatchID>") else None,
        llm_dim=sample.shape[1],
        hidden_multiple=config.mapping.hidden_multiple,
        tokens_per_slot=config.mapping.tokens_per_slot,
        out_scale=float(sample.float().square().mean().sqrt()),
        seed=config.run.seed,
    )


def load_stage_model(config: Config, run_dir: RunDir, name: StageName) -> LoadedStage:
    """Load a finished stage's model for scoring, on every process.

    Raises:
        ArtifactError: the stage is not done.
    """
    run_dir.read_record(name)
    device = init_distributed(config.cluster.collective_timeout_minutes)
    stage = get_stage(config, name)
    folder = run_dir.step_dir(name)
    if isinstance(stage, Stage1):
        loaded = _load_stage1(config, run_dir, folder, device)
    else:
        loaded = build_stage(config, run_dir, stage, device)
        assert loaded.model.slot_mapper is not None
        load_mapper(loaded.model.slot_mapper, loaded.model.cf_model, folder / "mapping.safetensors")
    loaded.model.eval().requires_grad_(False)
    return loaded


def _load_stage1(config: Config, run_dir: RunDir, folder: Path, device: torch.device) -> LoadedStage:
    llm = config.llm
    backbone = load_backbone(
        str(folder / "merged"), dtype=llm.dtype, attention=llm.attention, trust_remote_code=llm.trust_remote_code
    )
    collator = build_collator(config, run_dir, backbone.tokenizer, "stage1")
    answers = resolve_answer_ids(backbone.tokenizer, config.prompt.yes, config.prompt.no)
    model = CollmModel(backbone.model, answers, config.prompt.score)
    return LoadedStage(model.to(device), collator, backbone, None, device)


def run_stage(config: Config, run_dir: RunDir, name: StageName, force: bool = False) -> dict[str, Any]:
    """Train a stage, unless it is done, from its last checkpoint if there is one. Called on every process.

    Returns:
        The stage's summary.

    Raises:
        CollmError: see ``TuningLoop.run`` and ``build_stage``.
    """
    fingerprint = compute_stage_fingerprint(config, run_dir, name)
    folder = run_dir.step_dir(name)
    if not force and is_step_current(run_dir, name, fingerprint):
        if get_rank() == 0:
            print(f"{name}: done already ({folder})")
        return run_dir.read_record(name)
    device = init_distributed(config.cluster.collective_timeout_minutes)
    stage = get_stage(config, name)
    settings = get_stage_config(config, stage)
    _clear(run_dir, name, force)
    loaded = build_stage(config, run_dir, stage, device)
    train_order, valid_order = _build_orders(config, run_dir, settings)

    checkpoint = find_last_checkpoint(folder / "checkpoints")
    state, progress = load_checkpoint(checkpoint, fingerprint) if checkpoint else (None, Progress())
    engine = _build_engine(config, settings, loaded, state, folder)
    logger = monitoring.RunLogger(
        folder,
        is_main=get_rank() == 0,
        tensorboard=config.monitoring.tensorboard,
        progress_bar=config.monitoring.progress_bar,
        start_step=progress.global_step,
        total_steps=count_total_steps(settings, train_order),
    )
    if get_rank() == 0:
        example = next(train_order.iter_batches())
        logger.log_text("prompt", render_example(loaded.collator, example, loaded.backbone.tokenizer))
    loop = TuningLoop(
        engine,
        loaded.collator,
        train_order,
        load_valid_rows(valid_order),
        settings,
        seed=config.run.seed,
        mask_probability=config.mapping.mask_probability if name == "stage2" else 0.0,
        folder=folder / "checkpoints",
        fingerprint=fingerprint,
        progress=progress,
        logger=logger,
        log_every_steps=config.monitoring.log_every_steps,
    )
    try:
        progress = loop.run()
    finally:
        logger.close()
    best, _ = load_checkpoint(folder / "checkpoints" / "best.safetensors", fingerprint)
    if get_rank() == 0:
        product = _write_product(config, folder, stage, loaded, best)
        summary = {
            "stage": name,
            "global_steps": progress.global_step,
            "best_valid": {**progress.best_metrics, "step": progress.best_step},
            "last_train": {"loss": loop.last_loss},
            "throughput": {"samples_per_second": loop.trained_rows / max(loop.train_seconds, 1e-9)},
            "memory": {"peak_gib": monitoring.measure_peak_gib(device)},
            "trainable_parameters": sum(one.numel() for one in best.weights.values()),
            "world_size": get_world_size(),
            "train_rows": train_order.num_rows,
            "split_contexts": train_order.num_split_contexts,
            "dropped_history_items": loaded.collator.num_dropped_history,
            "fingerprint": fingerprint,
            "content_hash": compute_file_hash(product),
        }
        write_json(run_dir.record_path(name), summary)
        _print_summary(name, summary)
    if get_world_size() > 1:
        dist.barrier()
    return run_dir.read_record(name)


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


def _build_orders(config: Config, run_dir: RunDir, settings: StageConfig) -> tuple[GlobalOrder, GlobalOrder]:
    data_dir = run_dir.step_dir("data")
    manifest = load_manifest(data_dir)
    train = GlobalOrder(
        data_dir,
        manifest,
        "train",
        config.run.seed,
        settings.global_batch_size,
        max_contexts=settings.max_train_contexts,
    )
    valid = GlobalOrder(
        data_dir,
        manifest,
        "valid",
        config.run.seed,
        VALID_BATCH_ROWS,
        max_contexts=settings.max_valid_contexts,
        shuffle=False,
    )
    return train, valid


def _write_product(config: Config, folder: Path, stage: Stage, loaded: LoadedStage, best: TrainingState) -> Path:
    """Write what the stage leaves behind and return the file that stands for it."""
    if isinstance(stage, Stage2):
        return save_mapper(folder / "mapping.safetensors", best.weights)
    source, llm = loaded.backbone.source, config.llm
    weights = {name.removeprefix("backbone."): value for name, value in best.weights.items()}
    save_adapter(loaded.adapter, folder / "adapter", weights, source.public_name, source.revision)
    loaded.backbone.tokenizer.save_pretrained(str(folder / "adapter"))
    # From the files, on the CPU: the model in use may be partitioned.
    plain = load_backbone(
        llm.backbone, llm.revision, dtype=llm.dtype, attention=llm.attention, trust_remote_code=llm.trust_remote_code
    )
    merge_adapter(plain.model, folder / "adapter").save_pretrained(str(folder / "merged"))
    loaded.backbone.tokenizer.save_pretrained(str(folder / "merged"))
    return folder / "adapter" / "adapter_model.safetensors"


def _print_summary(name: str, summary: dict[str, Any]) -> None:
    best = summary["best_valid"]
    shown = "  ".join(f"{key} {best[key]:.4f}" for key in ("auc", "uauc", "logloss") if best.get(key) is not None)
    print(
        f"{name}: {summary['global_steps']} steps, best at step {best['step']}: valid {shown}; "
        f"{summary['throughput']['samples_per_second']:.2f} samples/s, {summary['memory']['peak_gib']:.2f} GiB"
    )


def describe_stage_plan(config: Config, run_dir: RunDir) -> list[str]:
    """Return lines about what both stages will do, for ``--dry-run``; only the data step must be done."""
    if not run_dir.is_done("data"):
        return ["steps: known once the data step is done"]
    lines = []
    for name in ("stage1", "stage2"):
        settings = get_stage_config(config, get_stage(config, name))
        train, valid = _build_orders(config, run_dir, settings)
        lines.append(
            f"{name}: {count_total_steps(settings, train):,} steps of {settings.global_batch_size} rows at most "
            f"({train.num_rows:,} rows in {train.num_contexts:,} contexts an epoch), "
            f"validation on {valid.num_rows:,} rows"
        )
    return lines
