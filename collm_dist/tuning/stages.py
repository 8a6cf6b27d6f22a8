"""The two stages: what each builds and trains (CoLLM, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from collm_dist.cf.model_files import load_cf_model
from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.cf.stage2_init import load_for_tuning
from collm_dist.config import Config, LlmConfig, StageConfig
from collm_dist.data.prompts.prompt_layout import PromptCollator, build_collator
from collm_dist.data.prompts.template import resolve_answer_ids
from collm_dist.data.samples.statistics import PAIR_FEATURES
from collm_dist.data.shards.manifest import Manifest, load_manifest
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import ArtifactError, ConfigError
from collm_dist.llm.backbone import Backbone, load_backbone
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.lora import add_lora
from collm_dist.llm.packed.compiled_layers import compile_layers
from collm_dist.llm.packed.passes import enable_activation_checkpointing
from collm_dist.llm.packed.prefix_cache import PrefixCache
from collm_dist.llm.slot_mapping import SlotMapper, load_mapper
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.engine import holds_anywhere, init_distributed

StageName = Literal["stage1", "stage2"]


@dataclass(frozen=True)
class Stage1:
    """LoRA trains, on text-only prompts."""

    name: ClassVar[StageName] = "stage1"


@dataclass(frozen=True)
class Stage2:
    """The mapping trains (and, if asked, the collaborative model), on prompts with slots; the rest is frozen."""

    train_cf: bool | Literal["scratch"] = False
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

    @property
    def scoring_collator(self) -> PromptCollator:
        """Of the same prompts where nothing trains. Prefixes that are kept outlive a mapping, so they hold no slots."""
        return self.collator.for_scoring(slots=self.model.prefix_cache is None)


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
    backbone = load_llm(config.llm, None if isinstance(stage, Stage1) else _find_merged(config, run_dir))
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
        cf_model = _load_start(config, run_dir, manifest)
        collator = build_collator(
            config,
            run_dir,
            backbone.tokenizer,
            "stage2",
            user_depends_on_target=cf_model.depends_on_target,
            time_cuts=cf_model.fold_starts,
        )
        mapper = _build_mapper(config, collator, backbone.model, cf_model.embedding_dim)
        if stage.train_cf and mapper.cf is None:
            raise ConfigError("stage2.train_cf: no slot of prompt.stage2 reads the collaborative model; add <UserID> "
                              "or <TargetItemID> to the prompt, or set stage2.train_cf to false")  # fmt: skip
        cf_model.to(device)
    train_cf = isinstance(stage, Stage2) and stage.train_cf is not False
    model = CollmModel(
        backbone.model,
        answers,
        config.prompt.score,
        mapper,
        cf_model,
        detach_cf=not train_cf,
        prefix_cache=_build_prefix_cache(config) if isinstance(stage, Stage2) else None,
    )
    _wrap_layers(config, model)
    return LoadedStage(model.to(device), collator, backbone, adapter, device)


def _load_start(config: Config, run_dir: RunDir, manifest: Manifest) -> SlotVectors:
    """Load the collaborative model as stage 2 begins with it."""
    if not config.stage2.train_cf:
        return load_cf_model(run_dir, manifest)
    is_anew = config.stage2.train_cf == "scratch"
    return load_for_tuning(
        run_dir, manifest, from_scratch=is_anew, init_scale=config.cf.init_scale, seed=config.run.seed
    )


def load_slot_vectors(config: Config, run_dir: RunDir, manifest: Manifest) -> SlotVectors:
    """Load the collaborative model that a finished stage 2 reads, on the CPU: where it trained along, as it ended.

    Raises:
        ArtifactError: the CF step or stage 2 is not done, or damaged.
    """
    cf_model = _load_start(config, run_dir, manifest).requires_grad_(False)
    if config.stage2.train_cf:
        load_mapper(None, cf_model, run_dir.step_dir("stage2") / "mapping.safetensors")
    return cf_model


def load_llm(llm: LlmConfig, folder: Path | None = None, *, may_quantize: bool = True) -> Backbone:
    """Load the backbone that the settings name, or with a folder the one that lies there, in their way.

    Args:
        llm: the settings.
        folder: of a merged backbone.
        may_quantize: no: whole weights whatever the settings say.

    Raises:
        ConfigError, DataError: see ``load_backbone``.
    """
    return load_backbone(
        str(folder or llm.backbone),
        None if folder else llm.revision,
        dtype=llm.dtype,
        attention=llm.attention,
        quantization=llm.quantization if may_quantize else "none",
        trust_remote_code=llm.trust_remote_code,
    )


def _wrap_layers(config: Config, model: CollmModel) -> None:
    if config.llm.compile:
        compile_layers(model.decoder)
    if config.llm.activation_checkpointing:
        enable_activation_checkpointing(model.decoder)


def _find_merged(config: Config, run_dir: RunDir) -> Path | None:
    """Return the folder of the backbone that stage 1 has left, None where the published one is read."""
    if not config.stage1.enabled:
        return None
    folder = run_dir.step_dir("stage1") / "merged"
    if not (folder / "config.json").exists():
        raise ArtifactError(f"{folder} is missing: run stage 1 first, or set stage1.enabled=false")
    return folder


def _build_prefix_cache(config: Config) -> PrefixCache | None:
    if config.stage2.context_cache == "none":
        return None
    max_bytes = int(config.stage2.context_cache_gib * 2**30)
    return PrefixCache(max_bytes, holds_anywhere) if config.cluster.zero_stage == 3 else PrefixCache(max_bytes)


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


def load_stage_model(
    config: Config, run_dir: RunDir, name: StageName, device: torch.device | None = None
) -> LoadedStage:
    """Load a finished stage's model for scoring.

    Args:
        config: the experiment.
        run_dir: of the run.
        name: of the stage.
        device: of a process that scores alone; None = that of this process among all, whose group it joins.

    Raises:
        ArtifactError: the stage is not done.
    """
    run_dir.read_record(name)
    device = device or init_distributed(config.cluster.collective_timeout_minutes)
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
    backbone = load_llm(config.llm, folder / "merged")
    collator = build_collator(config, run_dir, backbone.tokenizer, "stage1")
    answers = resolve_answer_ids(backbone.tokenizer, config.prompt.yes, config.prompt.no)
    model = CollmModel(backbone.model, answers, config.prompt.score)
    _wrap_layers(config, model)
    return LoadedStage(model.to(device), collator, backbone, None, device)
