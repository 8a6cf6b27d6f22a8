"""Settings of samples and shards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from collm_dist.config.section import Section


class PreprocessingConfig(Section):
    """How samples are built and packed. Bytes depend on the counts given here, never on workers."""

    ties: Literal["strict", "order"] = Field(
        "strict",
        description="Rows of one user with one timestamp. strict: none is earlier than the other. order: earlier in "
        "the file is earlier (the paper's way).",
    )
    max_history_length: int = Field(50, ge=1, description="Liked items kept with a context: the most any model reads.")
    max_dislikes: int = Field(10, ge=0, description="Disliked items kept with a row: the last ones before it.")
    num_user_buckets: int = Field(256, ge=1, description="Partitions by user; a bucket is the unit of memory.")
    num_shards: int = Field(16, ge=1, description="WebDataset shards of each split.")
    contexts_per_record: int = Field(256, ge=1, description="Contexts packed into one member of a shard.")
