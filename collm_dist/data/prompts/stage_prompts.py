"""Prompts of the stages: the collator of each, and what the prompts need of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from collm_dist.config import Config
from collm_dist.data.prompts import title_lists
from collm_dist.data.prompts.item_tokens import TextTokens, load_item_tokens, load_user_tokens
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.prompts.prompt_template import PromptTemplate, load_prompt_text
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.data.shards.interactions import load_item_table, load_user_texts
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ArtifactError, ConfigError
from collm_dist.runs.run_dir import RunDir

DEFAULT_USER_TEXT_TOKENS = 48
DEFAULT_UNKNOWN_TEXT = "(not known)"


def build_collator(
    config: Config,
    run_dir: RunDir,
    tokenizer: Any,
    stage: Literal["stage1", "stage2"],
    *,
    user_depends_on_target: bool = False,
    time_cuts: Sequence[int] = (),
    compute_anchors: Callable[[ContextBlock], NDArray[np.float32]] | None = None,
) -> PromptCollator:
    """Return the collator of a stage.

    Args:
        config: the experiment.
        run_dir: run directory with a finished data step.
        tokenizer: tokenizer of the backbone.
        stage: the tuning stage.
        user_depends_on_target, time_cuts, compute_anchors: see ``PromptCollator``.

    Raises:
        ConfigError: the prompt is invalid.
        ArtifactError: the data step is not done.
    """
    template = PromptTemplate.parse(
        load_prompt_text(config.prompt.stage2 if stage == "stage2" else config.prompt.stage1),
        allow_slots=stage == "stage2",
        user_depends_on_target=user_depends_on_target,
    )
    if config.prompt.score == "title" and not template.has("<TargetItemTitle>"):
        raise ConfigError(f"prompt.score=title reads the likelihood of the title, but prompt.{stage} has no "
                          "<TargetItemTitle>: add it, or choose another score")  # fmt: skip
    data_dir: Path = run_dir.step_dir("data")
    if template.has("<RatedTitleList>") and not load_manifest(data_dir).has_order:
        raise ArtifactError(
            f"{data_dir} does not hold the order of likes and dislikes, which the prompt's <RatedTitleList> needs: "
            "redo the data step with --force data"
        )
    stored = config.preprocessing
    texts, folder = load_item_table(data_dir)["text"], run_dir.path / "item_tokens"
    return PromptCollator(
        template,
        load_item_tokens(folder, texts, tokenizer, config.prompt.max_title_tokens),
        tokenizer,
        history_length=config.prompt.history_length,
        cf_history_length=config.preprocessing.max_history_length,
        max_prompt_tokens=config.prompt.max_prompt_tokens,
        empty_history_text=config.prompt.empty_history_text,
        tokens_per_slot=config.mapping.tokens_per_slot,
        user_depends_on_target=user_depends_on_target,
        time_cuts=time_cuts,
        compute_anchors=compute_anchors,
        disliked_length=config.prompt.disliked_length or title_lists.DEFAULT_DISLIKED_LENGTH,
        empty_dislikes_text=config.prompt.empty_dislikes_text,
        rated_length=config.prompt.rated_length
        or min(title_lists.DEFAULT_RATED_LENGTH, stored.max_history_length, stored.max_dislikes),
        rated_marks=config.prompt.rated_marks or title_lists.DEFAULT_RATED_MARKS,
        scores_titles=config.prompt.score == "title",
        user_tokens=_load_users(config, data_dir, folder, tokenizer) if template.has("<UserText>") else None,
    )


def _load_users(config: Config, data_dir: Path, folder: Path, tokenizer: Any) -> TextTokens:
    """Return the token ids of all user texts.

    Raises:
        ArtifactError: the data step has read no file of users.
    """
    if (table := load_user_texts(data_dir)) is None:
        raise ArtifactError(
            f"{data_dir} has no user texts, which the prompt's <UserText> needs: set dataset.users_path and "
            "dataset.user_text, and redo the data step with --force data"
        )
    unknown = DEFAULT_UNKNOWN_TEXT if config.prompt.unknown_user_text is None else config.prompt.unknown_user_text
    limit = config.prompt.max_user_text_tokens or DEFAULT_USER_TEXT_TOKENS
    return load_user_tokens(folder, table["text"], unknown, tokenizer, limit)
