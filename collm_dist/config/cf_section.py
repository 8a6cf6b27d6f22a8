"""Settings of the collaborative-filtering model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from collm_dist.config.section import Section, operational


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
