"""Settings of the models: collaborative filtering, prompt, language model, LoRA and mapping."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from collm_dist.config.base import Section, operational


class CfConfig(Section):
    """The collaborative-filtering model whose vectors the language model reads. It is fitted on all training rows."""

    model: Literal["mf"] = Field("mf", description="mf: matrix factorization with user, item and global bias.")
    embedding_dim: int = Field(64, ge=1, description="Width of the user and item vectors.")
    learning_rate: float = Field(3e-3, gt=0, description="Learning rate of Adam.")
    weight_decay: float = Field(
        5.0,
        ge=0,
        description="Inverse variance of the Gaussian prior on the vectors. Divided by the number of training rows it "
        "is Adam's own L2 coefficient: the paper's 1e-4 on ML-1M is 3.4 here, its 1e-6 on Amazon-Book 0.73.",
    )
    init_scale: float = Field(0.1, gt=0, description="Standard deviation of the initial vectors.")
    global_batch_size: int = Field(2048, ge=1, description="Rows per optimizer step, over all workers.")
    num_epochs: int = Field(100, ge=1, description="Most passes over the training rows.")
    select_metric: Literal["auc", "uauc", "logloss"] = Field(
        "auc", description="Validation metric that picks the best epoch."
    )
    early_stop_patience: int = Field(10, ge=1, description="Epochs without a better metric before stopping.")
    num_workers: int = operational(1, "Ray Train workers.", ge=1)
    checkpoint_every_epochs: int = operational(5, "Epochs between checkpoints.", ge=1)


class PromptConfig(Section):
    """The text that the language model reads. Fields and slots are written in angle brackets."""

    stage1: str = Field(
        "configs/prompts/stage1.txt",
        description="Prompt of stage 1: a file, or the text itself. Fields: <ItemTitleList> <TargetItemTitle>.",
    )
    stage2: str = Field(
        "configs/prompts/stage2.txt",
        description="Prompt of stage 2. Also slots: <UserID> <TargetItemID> <MatchID> <ItemIDList>.",
    )
    yes: str = Field(" Yes", description="Answer of a like; one token that differs from the other answer's first.")
    no: str = Field(" No", description="Answer of a dislike.")
    score: Literal["yes_minus_no", "yes"] = Field(
        "yes_minus_no", description="Logit of a like: difference of the answers' logits, or the paper's: yes alone."
    )
    history_length: int = Field(10, ge=0, description="Liked items shown, the last ones, oldest first.")
    max_title_tokens: int = Field(24, ge=1, description="A longer item text is cut at this many tokens.")
    max_prompt_tokens: int = Field(
        512, ge=16, description="Longest prompt; the oldest items of the history are dropped to fit, slots never."
    )
    empty_history_text: str = Field("(nothing yet)", description="Stands for the history of a user without likes.")


class LlmConfig(Section):
    """The language model."""

    backbone: str = Field(
        "smollm2-135m-instruct-q4_1",
        description="A named backbone, a model hub id, a local folder or a .gguf file; any causal language model.",
    )
    revision: str | None = Field(None, description="Revision of a hub id.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of weights and arithmetic; auto: bfloat16 on GPU, float32 on CPU."
    )
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention kernel of transformers.")
    activation_checkpointing: bool = operational(
        False, "Recompute the layers' activations in the backward pass: less memory, about a third more time."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with a hub model. Leave off unless vetted.")


class LoraConfig(Section):
    """The low-rank adapter that stage 1 trains."""

    rank: int = Field(8, ge=1, description="Rank of the update.")
    alpha: int = Field(16, ge=1, description="Scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "v_proj"), description="Names of the linear layers that are adapted."
    )


class MappingConfig(Section):
    """The mapping from collaborative vectors to the language model's input embeddings (paper, section 3.2)."""

    hidden_multiple: int = Field(10, ge=1, description="Hidden width as a multiple of the vector's width.")
    tokens_per_slot: int = Field(1, ge=1, description="Soft tokens that a slot becomes.")
    mask_probability: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of training slots whose vector is replaced by that of an unknown user or item, so that "
        "unknown ones are met in training too.",
    )

    @field_validator("tokens_per_slot")
    @classmethod
    def _reasonable(cls, value: int) -> int:
        if value > 16:
            raise ValueError("more than 16 soft tokens for a slot cannot be meant")
        return value
