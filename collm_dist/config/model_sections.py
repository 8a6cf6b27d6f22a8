"""Settings of the models: collaborative filtering, prompt, language model, LoRA and mapping."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from collm_dist.config.base import Section, operational


class CfConfig(Section):
    """The collaborative-filtering model whose vectors the language model reads."""

    model: str = Field(
        "mf",
        description="mf: matrix factorization; lightgcn; sasrec; din; table: vectors from elsewhere; or the import "
        "path of a class of your own, package.module:Class. All have user, item and global biases. none: no such "
        "model, but a token for each user and item that stage 2 learns from scratch (stage2.train_cf: scratch).",
    )
    embedding_dim: int = Field(64, ge=1, description="Width of the user and item vectors, without the bias.")
    history_length: int | None = Field(
        None, ge=1, description="Liked items that sasrec and din read; default: preprocessing.max_history_length."
    )
    feedback: Literal["likes", "all"] = Field(
        "likes",
        description="What scores read of the past beside liked items. all: also how often user and item were met and "
        "liked before each row (dislikes so count too), linearly; the pair slot carries the same numbers.",
    )
    num_layers: int = Field(2, ge=1, description="lightgcn: layers of the graph; sasrec: layers of attention.")
    num_heads: int = Field(1, ge=1, description="sasrec: heads of attention; they divide embedding_dim.")
    attention_sizes: tuple[int, ...] = Field(
        (80, 40), min_length=1, description="din: layers of the network that weighs the history."
    )
    hidden_sizes: tuple[int, ...] = Field((200, 80), description="din: layers of the final network.")
    dropout: float = Field(0.2, ge=0, lt=1, description="sasrec, din: dropout in training.")
    user_vectors: str | None = Field(
        None, description="table: Parquet file with columns id, vector for users; default: means of liked items."
    )
    item_vectors: str | None = Field(None, description="table: Parquet file with columns id, vector for items.")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="A class of your own: keyword arguments of its constructor, plain values."
    )
    learning_rate: float = Field(3e-3, gt=0, description="Learning rate of Adam.")
    weight_decay: float = Field(
        5.0,
        ge=0,
        description="Inverse variance of the Gaussian prior on the vectors. Divided by the number of training rows it "
        "is Adam's own L2 coefficient: the paper's 1e-4 on ML-1M is 3.4 here, its 1e-6 on Amazon-Book 0.73.",
    )
    bias_weight_decay: float = Field(1.0, ge=0, description="Inverse variance of the prior on user and item biases.")
    init_scale: float = Field(0.1, gt=0, description="Standard deviation of the initial vectors.")
    unknown_item_share: float = Field(
        0.01, ge=0, lt=1, description="Share of training targets that stand for the unknown item, whose row is learned."
    )
    global_batch_size: int = Field(2048, ge=1, description="Rows per optimizer step in the mean, over all workers.")
    num_epochs: int = Field(100, ge=1, description="Most passes over the training rows.")
    select_metric: Literal["auc", "uauc", "logloss"] = Field(
        "auc", description="Validation metric that picks the best epoch."
    )
    early_stop_patience: int = Field(10, ge=1, description="Epochs without a better metric before stopping.")
    seeds: tuple[int, ...] = Field(
        (),
        description="Train once for each; the summary has mean and spread, the language model reads the first one's "
        "vectors. Default: run.seed alone.",
    )
    cross_fit: Literal["off"] | int = Field(
        "off",
        description="Time folds of the training rows, 2 or more: what a row's slots carry then comes from a model of "
        "the folds before and from the history, so its own label is not in it. off: one model of all training rows "
        "(the paper's way), which looks better on the rows it knows than it is.",
    )
    fold_epochs: int = Field(10, ge=1, description="cross_fit: passes over the rows of each fold's model.")
    warm_start: bool = Field(
        True,
        description="With dataset.extend_from: begin with that run's weights, where its model is of the same kind and "
        "size and cross_fit is off (what has seen later labels must not serve earlier folds); in any case turn the "
        "vectors towards that run's, whose mapping stage 2 then goes on from.",
    )
    num_workers: int = operational(1, "Ray Train workers.", ge=1)
    checkpoint_every_epochs: int = operational(5, "Epochs between checkpoints.", ge=1)

    @field_validator("cross_fit", mode="before")
    @classmethod
    def _read_off(cls, value: Any) -> Any:
        if value is False or value == 0:  # YAML reads a bare off as false
            return "off"
        if isinstance(value, int) and not isinstance(value, bool) and value < 2:
            raise ValueError("takes off, or at least 2 folds")
        return value

    @model_validator(mode="after")
    def _check(self) -> CfConfig:
        if self.model == "table" and self.item_vectors is None:
            raise ValueError("cf.model 'table' needs cf.item_vectors, a Parquet file with columns id, vector")
        if self.model == "table" and self.cross_fit != "off":
            raise ValueError("cf.cross_fit fits models to folds; the vectors of cf.model 'table' are given: set off")
        if self.model == "none" and (self.cross_fit != "off" or self.feedback != "likes"):
            raise ValueError(
                "cf.model 'none' fits and scores nothing by itself: set cf.cross_fit to off and cf.feedback to likes"
            )
        if self.model == "sasrec" and self.embedding_dim % self.num_heads:
            raise ValueError(f"cf.num_heads {self.num_heads} does not divide cf.embedding_dim {self.embedding_dim}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"cf.seeds {list(self.seeds)}: one occurs twice")
        return self


# Settings that a search cannot choose, and why.
NOT_SEARCHED = {
    "select_metric": "it is what trials are compared by",
    "num_epochs": "every trial may train for the same number of epochs, and its best one counts",
    "seeds": "a lucky seed is no setting",
    "cross_fit": "trials fit one model to all training rows",
    "warm_start": "trials begin from nothing",
    "fold_epochs": "trials fit one model to all training rows",
    "num_workers": "it does not change what comes out",
    "checkpoint_every_epochs": "it does not change what comes out",
}
SearchSpace = dict[str, dict[Literal["choice", "uniform", "log_uniform", "integer"], tuple[Any, ...]]]
DEFAULT_SPACE: SearchSpace = {
    "learning_rate": {"log_uniform": (3e-4, 3e-2)},
    "weight_decay": {"log_uniform": (0.1, 300.0)},
    "init_scale": {"log_uniform": (0.01, 0.3)},
}


class CfSearchConfig(Section):
    """A search for the CF model's settings (launch/search_cf.py). The other steps do not read it."""

    space: SearchSpace = Field(
        DEFAULT_SPACE,
        description="Settings of the cf section and where to look: {choice: [a, b, ...]}, {uniform: [low, high]}, "
        "{log_uniform: [low, high]} or {integer: [low, high]}, ends included.",
    )
    num_trials: int = Field(30, ge=1, description="Settings tried, the first being those of the cf section itself.")
    grace_epochs: int = Field(5, ge=1, description="Epochs before ASHA may stop a trial.")
    reduction_factor: int = Field(3, ge=2, description="ASHA keeps one trial in so many at each rung.")
    parallel_trials: int | None = operational(
        None, "Trials at once; default: one per CPU (per GPU if there are).", ge=1
    )

    @field_validator("space")
    @classmethod
    def _check_space(cls, space: SearchSpace) -> SearchSpace:
        if not space:
            raise ValueError("names no setting: there is nothing to look for")
        for name, form in space.items():
            if name not in CfConfig.model_fields:
                near = difflib.get_close_matches(name, CfConfig.model_fields, n=1)
                raise ValueError(
                    f"{name} is no setting of the cf section" + (f"; did you mean {near[0]}?" if near else "")
                )
            if name in NOT_SEARCHED:
                raise ValueError(f"{name}: {NOT_SEARCHED[name]}")
            _check_form(name, form)
        return space


def _check_form(name: str, form: dict[Any, tuple[Any, ...]]) -> None:
    if len(form) != 1:
        raise ValueError(f"{name}: takes one of choice, uniform, log_uniform and integer, found {len(form)}")
    ((kind, values),) = form.items()
    if kind == "choice":
        if not values:
            raise ValueError(f"{name}: choice is empty")
        return
    numbers = int if kind == "integer" else (int, float)
    if len(values) != 2 or not all(isinstance(one, numbers) and not isinstance(one, bool) for one in values):
        raise ValueError(f"{name}: {kind} takes two {'whole ' * (kind == 'integer')}numbers, [low, high]: {[*values]}")
    if not values[0] < values[1] or (kind == "log_uniform" and values[0] <= 0):
        above = "0 < low < high" if kind == "log_uniform" else "low < high"
        raise ValueError(f"{name}: {kind} needs {above}: {[*values]}")


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
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Hold the frozen weights in fewer bits (needs bitsandbytes): a 7B backbone in 4 GB instead of 14. "
        "Stage 2 quantizes the backbone with stage 1's update merged in. 8bit also rounds activations, by a rule that "
        "looks at a whole micro-batch, so scores depend a little on batching; 4bit rounds weights alone.",
    )
    compile: bool = operational(
        False, "Run the decoder's layers through torch.compile: seconds to minutes at the start, then faster steps."
    )
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
