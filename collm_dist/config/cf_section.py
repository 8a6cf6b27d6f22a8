"""Settings of the collaborative-filtering model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from collm_dist.config.section import Section, operational, optional


class CfConfig(Section):
    """The collaborative-filtering (CF) model, whose vectors the language model reads."""

    model: str = Field(
        "mf",
        description="mf (matrix factorization), lightgcn, sasrec or din. table: given vectors. package.module:Class: "
        "import path of a custom class. All models have user, item and global biases. none: no CF model; "
        "stage 2 learns a token for each user and item from scratch (stage2.train_cf: scratch).",
    )
    embedding_dim: int = Field(64, ge=1, description="Width of the user and item vectors, without the bias.")
    history_length: int | None = Field(
        None, ge=1, description="Liked items that sasrec and din read; default: preprocessing.max_history_length."
    )
    feedback: Literal["likes", "all"] = Field(
        "likes",
        description="Past feedback behind the scores. likes: the liked items. all: also how often user and item "
        "occurred and were liked before the row (so dislikes count), as linear features; the pair slot "
        "carries the same numbers.",
    )
    item_text: int | None = optional(
        "Width of text vectors of the items (TF-IDF of the item texts and a truncated SVD), from which a learned "
        "linear map adds to every item's vector and bias: rare and unseen items are known by their text. Try 64. "
        "Default: off.",
        ge=1,
    )
    num_layers: int = Field(2, ge=1, description="lightgcn: graph layers. sasrec: attention layers.")
    num_heads: int = Field(1, ge=1, description="sasrec: attention heads; their number must divide embedding_dim.")
    attention_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (80, 40), min_length=1, description="din: hidden sizes of the MLP for the attention weights of the history."
    )
    hidden_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (200, 80), description="din: hidden sizes of the final MLP."
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="sasrec, din: dropout in training.")
    user_vectors: str | None = Field(
        None,
        description="table: Parquet file of user vectors with columns id and vector; default: means of the vectors of "
        "liked items.",
    )
    item_vectors: str | None = Field(
        None, description="table: Parquet file of item vectors with columns id and vector."
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Custom class: keyword arguments of its constructor (plain values)."
    )
    learning_rate: float = Field(3e-3, gt=0, description="Learning rate of Adam.")
    weight_decay: float = Field(
        5.0,
        ge=0,
        description="Inverse variance of the Gaussian prior on the vectors. Divided by the number of training rows, it "
        "is Adam's L2 coefficient: the paper's 1e-4 on ML-1M is 3.4 here, its 1e-6 on Amazon-Book 0.73.",
    )
    bias_weight_decay: float = Field(1.0, ge=0, description="Inverse variance of the prior on user and item biases.")
    init_scale: float = Field(0.1, gt=0, description="Standard deviation of the initial vectors.")
    unknown_item_share: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="Share of training targets that are replaced by the unknown item, so that its row is learned.",
    )
    global_batch_size: int = Field(2048, ge=1, description="Mean number of rows per optimizer step, over all workers.")
    num_epochs: int = Field(100, ge=1, description="Maximum number of passes over the training rows.")
    select_metric: Literal["auc", "uauc", "logloss"] = Field(
        "auc", description="Validation metric that picks the best epoch."
    )
    early_stop_patience: int = Field(10, ge=1, description="Epochs without improvement after which training stops.")
    seeds: tuple[int, ...] = Field(
        (),
        description="Train once per seed: the summary has mean and spread, and the language model reads the vectors of "
        "the first seed. Default: run.seed alone.",
    )
    cross_fit: Literal["off"] | int = Field(
        "off",
        description="Number of time folds of the training rows, at least 2: the slots of a row then come from a model "
        "of the earlier folds and from the history, which have not seen the row's label. off: one model of "
        "all training rows (the paper's way), which looks better on those rows than on new ones.",
    )
    fold_epochs: int = Field(
        10, ge=1, description="cross_fit: passes over the training rows for the model of each fold."
    )
    warm_start: bool = Field(
        True,
        description="With dataset.extend_from: start from the weights of that run if its model has the same type and "
        "size and cross_fit is off (weights that have seen later labels must not serve earlier folds). In "
        "any case, rotate the vectors onto those of that run, so that stage 2 can continue with its "
        "mapping.",
    )
    num_workers: int = operational(1, "Ray Train workers.", ge=1)
    checkpoint_every_epochs: int = operational(5, "Epochs between checkpoints.", ge=1)

    @field_validator("cross_fit", mode="before")
    @classmethod
    def _read_off(cls, value: Any) -> Any:
        return "off" if value is False or value == 0 else value  # other YAML tools write off as false

    @field_validator("cross_fit")
    @classmethod
    def _check_folds(cls, value: Any) -> Any:
        if value != "off" and value < 2:
            raise ValueError("should be off or at least 2 folds")
        return value

    @model_validator(mode="after")
    def _check(self) -> CfConfig:
        if self.model == "table" and self.item_vectors is None:
            raise ValueError("cf.model 'table' needs cf.item_vectors, a Parquet file with columns id and vector")
        if self.item_text is not None and self.model in ("table", "none"):
            raise ValueError(
                f"cf.item_text {self.item_text} needs a model that learns item vectors, which cf.model "
                f"'{self.model}' does not; leave it out, or choose mf, lightgcn, sasrec or din"
            )
        if self.model == "table" and self.cross_fit != "off":
            raise ValueError(
                "cf.cross_fit needs a model to train, but cf.model 'table' has given vectors: set it to off"
            )
        if self.model == "none" and (self.cross_fit != "off" or self.feedback != "likes"):
            raise ValueError(
                "cf.model 'none' has nothing to train or score in the cf step: set cf.cross_fit to off and cf.feedback "
                "to likes"
            )
        if self.model == "sasrec" and self.embedding_dim % self.num_heads:
            raise ValueError(f"cf.num_heads {self.num_heads} does not divide cf.embedding_dim {self.embedding_dim}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"cf.seeds {list(self.seeds)}: duplicate seed")
        return self
