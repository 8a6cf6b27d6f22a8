"""Settings of the two tuning stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from collm_dist.config.section import Section, operational


class StageConfig(Section):
    """What both tuning stages share."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    final_learning_rate_share: float = Field(
        0.08, ge=0, le=1, description="Cosine decay ends at this share of the peak."
    )
    warmup_steps: int = Field(200, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(1e-3, ge=0, description="Weight decay of AdamW.")
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="Coefficients of AdamW's running averages.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the global gradient norm at this; 0 switches it off.")
    global_batch_size: int = Field(32, ge=1, description="Rows per optimizer step, over all processes.")
    max_tokens_per_micro_batch: Annotated[int, Field(ge=16)] | Literal["auto"] = operational(
        8192,
        "Most tokens in one forward pass of one process: the memory knob. auto: found before the first step by "
        "a few trials, on a GPU as many as fit, on a CPU fewer if that is faster.",
    )
    num_epochs: int = Field(10, ge=1, description="Most passes over the training contexts.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many steps; also the length of the cosine.")
    max_train_contexts: int | None = Field(
        None, ge=1, description="Train on this many contexts, chosen by hash; default all."
    )
    max_valid_contexts: int | None = Field(
        None, ge=1, description="Validate during training on this many contexts, chosen by hash; default all."
    )
    eval_every_steps: int = Field(100, ge=1, description="Steps between validations.")
    early_stop_patience: int = Field(10, ge=1, description="Validations without a better metric before stopping.")
    select_metric: Literal["auc", "uauc", "logloss"] = Field(
        "auc", description="Validation metric that picks the best checkpoint."
    )
    checkpoint_every_steps: int = operational(100, "Most steps between checkpoints to resume from.", ge=1)
    checkpoint_every_minutes: float = operational(10.0, "Most minutes between them.", gt=0)
    # What a finished stage has made does not depend on these two, and one that was stopped may go on with others.
    on_nonfinite: Literal["stop", "skip"] = operational(
        "stop",
        "Where the loss or a gradient of a step is no finite number: stop before the update, or leave the step out.",
    )
    max_nonfinite_skips: int = operational(10, "skip: steps that may be left out, in all.", ge=0)


class Stage1Config(StageConfig):
    """Stage 1: LoRA on text-only prompts (what TALLRec does)."""

    enabled: bool = Field(True, description="Off: stage 2 trains the mapping on the untouched backbone.")
    refresh_every_days: float | None = Field(
        None,
        gt=0,
        description="With dataset.extend_from: take that run's stage 1 until the training data reach so many days "
        "beyond what it was trained on; default: train it in every run.",
    )


class Stage2Config(StageConfig):
    """Stage 2: the mapping alone, on prompts with slots; language model and adapter frozen."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    train_cf: bool | Literal["scratch"] = Field(
        False,
        description="Also train the collaborative model. true: from where its own step left it (the paper's variant "
        "T1). scratch: from weights drawn anew (T2; what its own step trained is then only compared with).",
    )
    context_cache: Literal["none", "memory"] = operational(
        "none",
        "memory: keep the keys and values of constant prefixes from epoch to epoch. Pays where few contexts are "
        "visited often; --dry-run says what it would take.",
    )
    context_cache_gib: float = operational(4.0, "Host memory granted to it in each process, in GiB.", gt=0)
