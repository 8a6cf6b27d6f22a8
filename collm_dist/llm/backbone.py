"""Loading the backbone: any transformers causal language model, from a name, hub id, folder or GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from collm_dist.assets import BackboneSource, resolve_backbone
from collm_dist.errors import ConfigError, DataError


@dataclass(frozen=True)
class Backbone:
    """A loaded backbone.

    Attributes:
        model: the causal language model.
        tokenizer: its tokenizer.
        source: where it came from.
    """

    model: Any
    tokenizer: Any
    source: BackboneSource


def load_tokenizer(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load a backbone's tokenizer alone."""
    source = resolve_backbone(name, revision)
    with _hub_errors(name):
        return AutoTokenizer.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=trust_remote_code
        )


def load_backbone(
    name: str,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> Backbone:
    """Load a backbone and its tokenizer; nothing in it is trainable.

    Args:
        name, revision: see ``assets.resolve_backbone``.
        dtype: float32, bfloat16, or auto (bfloat16 on a GPU, float32 without).
        attention: transformers' attention implementation.
        trust_remote_code: run code that comes with a hub model.

    Raises:
        ConfigError: not a causal language model.
        DataError: it cannot be found or fetched.
    """
    source = resolve_backbone(name, revision)
    # Bars of a second each, one a process, between our own.
    transformers_logging.disable_progress_bar()
    options = {"revision": source.revision, "trust_remote_code": trust_remote_code}
    with _hub_errors(name):
        config = AutoConfig.from_pretrained(source.location, **options)
        _check_is_causal(name, config)
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source.location, dtype=resolve_dtype(dtype), attn_implementation=attention, **options
        )
    model.requires_grad_(False)
    return Backbone(model=model, tokenizer=tokenizer, source=source)


def resolve_dtype(dtype: str) -> torch.dtype:
    """Return the torch type of ``llm.dtype``."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def _check_is_causal(name: str, config: Any) -> None:
    """Refuse encoders and encoder-decoders, which transformers may well load as something else."""
    known = type(config) in AutoModelForCausalLM._model_mapping
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    declared = getattr(config, "architectures", None) or ["CausalLM"]
    if not (known or remote) or not any("CausalLM" in one or "LMHead" in one for one in declared):
        raise ConfigError(
            f"llm.backbone: '{name}' is a {config.model_type} model ({', '.join(declared)}), not a causal language "
            "model; choose one that transformers loads with AutoModelForCausalLM"
        )


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises for a missing model into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"llm.backbone: '{name}' cannot be loaded ({str(error).splitlines()[0]}). Without access to the model hub, "
            "give a local folder with config.json, tokenizer and *.safetensors, or a .gguf file"
        ) from error
