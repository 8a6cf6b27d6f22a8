"""Stage 2: the mapping, and on request the CF model, on prompts with slots; the language model is frozen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor

from collm_dist.cf.model_files import load_cf_model
from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.cf.stage2_init import load_for_tuning
from collm_dist.config import Config, LoraConfig, StageConfig
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.samples.pair_features import PAIR_FEATURES
from collm_dist.data.shards.manifest import Manifest, load_manifest
from collm_dist.distributed import any_rank, run_on_rank_0
from collm_dist.errors import ArtifactError, ConfigError
from collm_dist.llm.packed.prefix_cache import PrefixCache
from collm_dist.llm.slot_mapping import SlotMapper, load_mapper, save_mapper
from collm_dist.runs.damage import name_damage
from collm_dist.runs.file_hashes import check_files
from collm_dist.runs.previous_run import find_previous_file
from collm_dist.runs.run_dir import RunDir, StageName
from collm_dist.tuning.loaded_stage import (
    LoadedStage,
    assemble_stage,
    build_stage_collator,
    load_llm,
    resolve_answers,
)
from collm_dist.tuning.projector_items import write_projector_items

logger = logging.getLogger(__name__)

_CF_FIELDS = ("<UserID>", "<TargetItemID>", "<ItemIDList>")


@dataclass(frozen=True)
class Stage2:
    """The mapping trains on prompts with slots, on top of stage 1's merged backbone. The product is the mapping."""

    config: Config
    name: ClassVar[StageName] = "stage2"
    has_slots: ClassVar[bool] = True
    is_enabled: ClassVar[bool] = True
    lora: ClassVar[LoraConfig | None] = None

    @property
    def settings(self) -> StageConfig:
        """The config section."""
        return self.config.stage2

    @property
    def mask_probability(self) -> float:
        """Share of slots whose vector is hidden in training."""
        return self.config.mapping.mask_probability

    def build(self, run_dir: RunDir, device: torch.device) -> LoadedStage:
        """Build the frozen backbone, the CF model as its step left it, and a fresh mapping; see ``Stage.build``."""
        config = self.config
        backbone = load_llm(config.llm, self._find_merged_backbone(run_dir))
        answer_ids = resolve_answers(config, backbone)
        cf_model = _load_cf_start(config, run_dir, load_manifest(run_dir.step_dir("data")))
        collator = build_stage_collator(
            config,
            run_dir,
            backbone.tokenizer,
            self.name,
            user_depends_on_target=cf_model.depends_on_target,
            time_cuts=cf_model.fold_starts,
        )
        mapper = _build_mapper(config, collator, backbone.model, cf_model.embedding_dim)
        train_cf = config.stage2.train_cf is not False
        if train_cf and mapper.cf is None:
            raise ConfigError("stage2.train_cf: no slot of prompt.stage2 reads the collaborative model; add <UserID> "
                              "or <TargetItemID> to the prompt, or set stage2.train_cf to false")  # fmt: skip
        return assemble_stage(
            config,
            device,
            backbone,
            answer_ids,
            collator,
            slot_mapper=mapper,
            cf_model=cf_model.to(device),
            detach_cf=not train_cf,
            prefix_cache=_build_prefix_cache(config),
        )

    def warm_start(self, loaded: LoadedStage) -> None:
        """Start the mapping from the previous run's, if it has the same slots and sizes; see ``Stage.warm_start``."""
        path, mapper = find_previous_file(self.config, self.name), loaded.model.slot_mapper
        if path is None:
            return
        assert mapper is not None
        check_files(RunDir(path.parents[1]), self.name)
        with name_damage(path, "redo its stage 2 with --force stage2"):
            weights = safetensors.torch.load_file(str(path))
        prefix = "slot_mapper."
        previous = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        shapes = {key: value.shape for key, value in mapper.state_dict().items()}
        if shapes == {key: value.shape for key, value in previous.items()}:
            mapper.load_state_dict(previous)
            logger.info("stage2: the mapping starts from the weights of %s", path)
        else:
            logger.warning("stage2: %s has other slots or sizes; the mapping starts from fresh weights", path)

    def take_over(self, run_dir: RunDir, fingerprint: Mapping[str, Any]) -> bool:
        """Return False: stage 2 trains in every run."""
        return False

    def save_product(self, run_dir: RunDir, loaded: LoadedStage, weights: dict[str, Tensor]) -> Path:
        """Write ``mapping.safetensors``, and item vectors for TensorBoard's projector; see ``Stage.save_product``."""
        folder, monitoring = run_dir.step_dir(self.name), self.config.monitoring
        path = save_mapper(folder / "mapping.safetensors", weights)
        if monitoring.tensorboard and monitoring.projector_items:
            data_dir = run_dir.step_dir("data")
            write_projector_items(folder / "tensorboard", data_dir, loaded, weights, monitoring.projector_items)
        return path

    def load(self, run_dir: RunDir, device: torch.device) -> LoadedStage:
        """Build the model and load what was trained; see ``Stage.load``."""
        run_on_rank_0(lambda: check_files(run_dir, self.name))
        loaded = self.build(run_dir, device)
        model, path = loaded.model, run_dir.step_dir(self.name) / "mapping.safetensors"
        load_mapper(model.slot_mapper, model.cf_model, path, model.anchored_score)
        return loaded

    def _find_merged_backbone(self, run_dir: RunDir) -> Path | None:
        """Return the folder of stage 1's merged backbone; None = the published one is used."""
        if not self.config.stage1.enabled:
            return None
        folder = run_dir.step_dir("stage1") / "merged"
        if not (folder / "config.json").exists():
            raise ArtifactError(f"{folder} is missing: run stage 1 first, or set stage1.enabled=false")
        run_on_rank_0(lambda: check_files(run_dir, "stage1", "merged/"))
        return folder


def load_slot_vectors(config: Config, run_dir: RunDir, manifest: Manifest) -> SlotVectors:
    """Load the CF model that a finished stage 2 reads, on the CPU; if it was trained there, with the trained weights.

    Raises:
        ArtifactError: the CF step or stage 2 is not done, or damaged.
    """
    cf_model = _load_cf_start(config, run_dir, manifest).requires_grad_(False)
    if config.stage2.train_cf:
        check_files(run_dir, "stage2")
        load_mapper(None, cf_model, run_dir.step_dir("stage2") / "mapping.safetensors")
    return cf_model


def _load_cf_start(config: Config, run_dir: RunDir, manifest: Manifest) -> SlotVectors:
    """Load the CF model that stage 2 starts from."""
    if not config.stage2.train_cf:
        return load_cf_model(run_dir, manifest)
    from_scratch = config.stage2.train_cf == "scratch"
    return load_for_tuning(
        run_dir, manifest, from_scratch=from_scratch, init_scale=config.cf.init_scale, seed=config.run.seed
    )


def _build_prefix_cache(config: Config) -> PrefixCache | None:
    if config.stage2.context_cache == "none":
        return None
    max_bytes = int(config.stage2.context_cache_gib * 2**30)
    return PrefixCache(max_bytes, any_rank) if config.cluster.zero_stage == 3 else PrefixCache(max_bytes)


def _build_mapper(config: Config, collator: PromptCollator, backbone: Any, cf_dim: int) -> SlotMapper:
    template, embeddings = collator.template, backbone.get_input_embeddings()
    with torch.no_grad():
        sample = embeddings(torch.arange(min(4096, embeddings.num_embeddings)))
    return SlotMapper(
        cf_dim=cf_dim if any(template.has(field) for field in _CF_FIELDS) else None,
        pair_dim=len(PAIR_FEATURES) if template.has("<MatchID>") else None,
        llm_dim=sample.shape[1],
        hidden_multiple=config.mapping.hidden_multiple,
        tokens_per_slot=config.mapping.tokens_per_slot,
        out_scale=float(sample.float().square().mean().sqrt()),
        seed=config.run.seed,
    )
