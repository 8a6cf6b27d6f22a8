"""Settings of the language model, its LoRA adapter, and the mapping."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from collm_dist.config.section import Section, operational


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
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention implementation of transformers.")
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Store the frozen weights in fewer bits (needs bitsandbytes): a 7B backbone takes 4 GB instead of "
        "14. Stage 2 quantizes the backbone after merging the update of stage 1. 8bit also rounds "
        "activations, depending on the whole micro-batch, so scores depend slightly on batching; 4bit "
        "rounds weights only.",
    )
    compile: bool = operational(
        False, "Compile the decoder layers with torch.compile: seconds to minutes at the start, then faster steps."
    )
    activation_checkpointing: bool = operational(
        False, "Recompute the layers' activations in the backward pass: less memory, about a third more time."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with a hub model. Leave off unless vetted.")


class LoraConfig(Section):
    """What stage 1 trains: a low-rank adapter, or all weights of the decoder layers."""

    rank: Annotated[int, Field(ge=1)] | Literal["full"] = Field(
        16,
        description="Rank of the update. full: no adapter; all weights of the decoder layers train, at 16 bytes of "
        "gradients, moments and float32 copies each, which cluster.zero_stage 1 and 2 divide among the processes. The "
        "other settings of this section then have no effect.",
    )
    alpha: int = Field(32, ge=1, description="Scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all"] = Field(
        "all",
        description="Names of the linear layers that are adapted. all: those of all decoder layers, except in a "
        "mixture of experts.",
    )


class MappingConfig(Section):
    """The mapping: an MLP from CF vectors to input embeddings of the language model (paper, section 3.2)."""

    hidden_multiple: int = Field(10, ge=1, description="Hidden width as a multiple of the vector's width.")
    tokens_per_slot: int = Field(1, ge=1, le=16, description="Soft tokens per slot.")
    mask_probability: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of training slots whose vector is replaced by that of an unknown user or item, so that "
        "training covers unknown users and items.",
    )
