"""A stage's model with its prompts and backbone, and the steps of building one that both stages share."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from collm_dist.anchor import load_anchor
from collm_dist.config import Config, LlmConfig
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.data.prompts.stage_prompts import build_collator
from collm_dist.llm.anchored_score import GAIN_RATE, AnchoredScore
from collm_dist.llm.backbone import Backbone, load_backbone
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.packed.decoder import PackedDecoder, find_decoder
from collm_dist.llm.title_likelihood import TitlePriors
from collm_dist.runs.damage import name_damage
from collm_dist.runs.run_dir import RunDir, StageName


@dataclass
class LoadedStage:
    """A stage's model, ready for training or scoring.

    Attributes:
        model: the module, its weights not yet partitioned.
        collator: lays out the stage's prompts.
        backbone: the language model with its tokenizer and source.
        adapter: peft's wrapper while an adapter trains, else None.
        device: the process's device.
    """

    model: CollmModel
    collator: PromptCollator
    backbone: Backbone
    adapter: Any
    device: torch.device

    @property
    def scoring_collator(self) -> PromptCollator:
        """Collator for evaluation mode. Cached prefixes outlive the mapping's weights, so they hold no slots."""
        return self.collator.for_scoring(slots=self.model.prefix_cache is None)


def load_llm(llm: LlmConfig, folder: Path | None = None, *, may_quantize: bool = True) -> Backbone:
    """Load the configured backbone, or a merged one with the same options.

    Args:
        llm: the config section.
        folder: a merged backbone; None = ``llm.backbone``.
        may_quantize: False = load whole weights whatever ``llm.quantization`` says.

    Raises:
        ConfigError, DataError: see ``load_backbone``.
        ArtifactError: the merged backbone is missing or damaged.
    """
    remedy = "restore the folder from a copy, or redo stage 1 with --force stage1"
    with nullcontext() if folder is None else name_damage(folder, remedy):
        return load_backbone(
            str(folder or llm.backbone),
            None if folder else llm.revision,
            dtype=llm.dtype,
            attention=llm.attention,
            quantization=llm.quantization if may_quantize else "none",
            trust_remote_code=llm.trust_remote_code,
            may_be_pickled=folder is None,
        )


def resolve_answers(config: Config, backbone: Backbone) -> tuple[int, int]:
    """Return the token ids of yes and no.

    Raises:
        ConfigError: an answer is not a single token of this backbone.
    """
    return resolve_answer_ids(backbone.tokenizer, config.prompt.yes, config.prompt.no)


def build_stage_collator(
    config: Config, run_dir: RunDir, tokenizer: Any, stage: StageName, **slots: Any
) -> PromptCollator:
    """Return the collator of a stage, with the run's anchor; further arguments as for ``build_collator``."""
    anchor = load_anchor(config, run_dir)
    return build_collator(
        config, run_dir, tokenizer, stage, compute_anchors=None if anchor is None else anchor.score, **slots
    )


def assemble_stage(
    config: Config,
    device: torch.device,
    backbone: Backbone,
    answer_ids: tuple[int, int],
    collator: PromptCollator,
    *,
    adapter: Any = None,
    gain_rate: float = GAIN_RATE,
    **slot_parts: Any,
) -> LoadedStage:
    """Put a stage's parts together on a device, with the configured layer options.

    Args:
        config: the experiment.
        device: the process's device.
        backbone, answer_ids, collator, adapter: see ``LoadedStage`` and ``resolve_answers``.
        gain_rate: see ``AnchoredScore``.
        slot_parts: further arguments of ``CollmModel``.
    """
    decoder = PackedDecoder(
        find_decoder(backbone.model),
        checkpointing=config.llm.activation_checkpointing,
        compile_backend="inductor" if config.llm.compile else None,
    )
    model = CollmModel(
        backbone.model,
        answer_ids,
        config.prompt.score,
        decoder=decoder,
        anchored_score=None if config.anchor.kind is None else AnchoredScore(gain_rate),
        title_priors=TitlePriors(collator.lay_out_without_history) if config.prompt.score == "title" else None,
        **slot_parts,
    )
    return LoadedStage(model.to(device), collator, backbone, adapter, device)
