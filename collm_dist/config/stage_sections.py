"""Settings of the two tuning stages."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from collm_dist.config.section import Section, operational, optional


def _check_metric(name: str) -> str:
    if not re.fullmatch(r"auc|uauc|logloss|(ndcg|hr)@[1-9]\d*", name):
        raise ValueError(
            f"'{name}' is not a validation metric: use auc, uauc, logloss, or ndcg@K or hr@K as in ndcg@10"
        )
    return name


# Of a running average: with 1 it would never move.
Beta = Annotated[float, Field(ge=0, lt=1)]
ValidMetric = Annotated[str, AfterValidator(_check_metric)]


class StageConfig(Section):
    """Settings that both tuning stages have."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    final_learning_rate_share: float = Field(
        0.08, ge=0, le=1, description="Cosine decay ends at this share of the peak."
    )
    warmup_steps: int = Field(200, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(1e-3, ge=0, description="Weight decay of AdamW.")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Coefficients of AdamW's running averages.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the global gradient norm at this value; 0: no clipping.")
    global_batch_size: int = Field(32, ge=1, description="Rows per optimizer step, over all processes.")
    max_tokens_per_micro_batch: Annotated[int, Field(ge=16)] | Literal["auto"] = operational(
        8192,
        "Maximum number of tokens in a forward pass of one process; it sets the memory use. auto: measured "
        "before the first step; on a GPU as many as fit, on a CPU fewer if that is faster.",
    )
    pairwise_weight: float | None = optional(
        "Weight of a loss on pairs of a like and a dislike among up to 16 targets of one context, besides the "
        "cross-entropy of single targets; default: off.",
        gt=0,
    )
    listwise_weight: float | None = optional(
        "implicit: weight of the softmax cross-entropy of each like among its sampled dislikes; default: off.", gt=0
    )
    llm_loss_weight: float | None = optional(
        "With an anchor: weight of the same loss of the language model's score alone, besides that of the anchored "
        "score. The gain starts at 0, where the language model has no gradient; with this term it learns from the "
        "first step. With prompt.score title only its terms that compare targets count. Default: 1 with an anchor, "
        "unless prompt.score is title and the loss has no such term.",
        gt=0,
    )
    num_epochs: int = Field(10, ge=1, description="Maximum number of passes over the training contexts.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many steps; also the length of the cosine schedule."
    )
    max_train_contexts: int | None = Field(
        None, ge=1, description="Train on this many contexts, chosen by hash; default: all."
    )
    max_valid_contexts: int | None = Field(
        None, ge=1, description="Validate during training on this many contexts, chosen by hash; default: all."
    )
    eval_every_steps: int = Field(100, ge=1, description="Steps between validations.")
    early_stop_patience: int = Field(
        10, ge=1, description="Validations without improvement after which training stops."
    )
    select_metric: ValidMetric = Field(
        "auc",
        description="Validation metric that picks the best checkpoint: auc, uauc or logloss; implicit: also ndcg@K "
        "or hr@K, of each like among its sampled dislikes. Default: auc; implicit: ndcg@K with the middle one of "
        "evaluation.cutoffs, as in the report.",
    )
    guard_metric: ValidMetric | None = optional(
        "Only pick checkpoints whose value of this metric is at most guard_margin worse than before training: auc, "
        "uauc, logloss; implicit: also ndcg@K or hr@K. Default: none."
    )
    guard_margin: float | None = optional("Largest tolerated loss of guard_metric; default: 0.005.", ge=0)
    checkpoint_every_steps: int = operational(100, "Maximum number of steps between checkpoints.", ge=1)
    checkpoint_every_minutes: float = operational(10.0, "Maximum time between checkpoints.", gt=0)
    # A finished stage does not depend on these two, and a stopped stage may resume with other values.
    on_nonfinite: Literal["stop", "skip"] = operational(
        "stop",
        "If the loss or a gradient of a step is not finite: stop before the update, or skip the step.",
    )
    max_nonfinite_skips: int = operational(10, "skip: maximum number of skipped steps, in total.", ge=0)

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if self.guard_margin is not None and self.guard_metric is None:
            raise ValueError(f"guard_margin {self.guard_margin} needs a guard_metric: set it, or leave both out")
        return self


class Stage1Config(StageConfig):
    """Stage 1: LoRA on text-only prompts (what TALLRec does)."""

    learning_rate: float = Field(
        2e-4, gt=0, description="Peak learning rate of AdamW. Default with lora.rank full: 1e-4."
    )
    enabled: bool = Field(True, description="false: stage 2 trains the mapping on the original backbone.")
    refresh_every_days: float | None = Field(
        None,
        gt=0,
        description="With dataset.extend_from: reuse stage 1 of that run until the training data extend this many days "
        "beyond those that it was trained on; default: train stage 1 in every run.",
    )


class Stage2Config(StageConfig):
    """Stage 2: the mapping, on prompts with slots; the language model and the adapter are frozen."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    train_cf: bool | Literal["scratch"] = Field(
        False,
        description="Also train the CF model. true: from the weights of the cf step (the paper's variant T1). scratch: "
        "from random weights (T2); the model of the cf step then only serves for comparison.",
    )
    context_cache: Literal["none", "memory"] = operational(
        "none",
        "memory: keep the keys and values of constant prefixes across epochs. It pays off if few contexts "
        "are visited often; --dry-run reports the memory that it needs.",
    )
    context_cache_gib: float = operational(4.0, "Host memory of the cache in each process, in GiB.", gt=0)
