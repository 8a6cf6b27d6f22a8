"""Settings of samples and shards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from collm_dist.config.section import Section


class PreprocessingConfig(Section):
    """Samples and their packing. The bytes depend on the counts given here, never on the number of workers."""

    ties: Literal["strict", "order"] = Field(
        "strict",
        description="Rows of a user with equal timestamps. strict: none of them precedes another. order: the order in "
        "the file decides (the paper's way).",
    )
    max_history_length: int = Field(
        50, ge=1, description="Liked items stored with a context: the most that any model can read."
    )
    max_dislikes: int = Field(10, ge=0, description="Most recent disliked items stored with a row.")
    num_user_buckets: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Partitions of the users; a task holds one bucket in memory. auto: by the size of the input files, "
        "1 to 256; with dataset.extend_from as many as that run has.",
    )
    num_shards: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="WebDataset shards per split. auto: by the size of the input files, 1 to 16."
    )
    contexts_per_record: int = Field(256, ge=1, description="Contexts per member of a shard.")
