"""Backbones: any transformers causal language model, loaded by name or hub id, from a folder or a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from collm_dist.assets import BackboneSource, resolve_backbone
from collm_dist.errors import CollmError, ConfigError, DataError

Quantization = Literal["none", "8bit", "4bit"]


@dataclass(frozen=True)
class Backbone:
    """A loaded backbone.

    Attributes:
        model: the causal language model.
        tokenizer: its tokenizer.
        source: of its files.
    """

    model: Any
    tokenizer: Any
    source: BackboneSource


def load_tokenizer(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load only the tokenizer of a backbone."""
    path = Path(name).expanduser()
    with _hub_errors(name):
        source = BackboneSource(str(path), None, name, "") if path.is_dir() else resolve_backbone(name, revision)
        return AutoTokenizer.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=trust_remote_code
        )


def load_backbone_config(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load only the configuration of a backbone; the weights of a local folder are not read.

    Raises:
        ConfigError: the model is not a causal language model.
        DataError: the model cannot be found or downloaded.
    """
    path = Path(name).expanduser()
    source = BackboneSource(str(path), None, name, "") if path.is_dir() else resolve_backbone(name, revision)
    with _hub_errors(name):
        config = AutoConfig.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=trust_remote_code
        )
    _check_is_causal(name, config)
    return config


def load_backbone(
    name: str,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    attention: str = "sdpa",
    quantization: Quantization = "none",
    trust_remote_code: bool = False,
    may_be_pickled: bool = True,
) -> Backbone:
    """Load a backbone, frozen, and its tokenizer.

    Args:
        name, revision: see ``assets.resolve_backbone``.
        dtype: float32, bfloat16, or auto (bfloat16 with a GPU, float32 without).
        attention: transformers' attention implementation.
        quantization: of the weights of linear layers other than the head, done while loading; arithmetic stays in
            ``dtype``.
        trust_remote_code: run code that comes with a hub model.
        may_be_pickled: whether weights other than safetensors are read.

    Raises:
        ConfigError: the model is not a causal language model, or bitsandbytes is not installed.
        DataError: the model cannot be found or downloaded.
    """
    with _hub_errors(name):
        source = resolve_backbone(name, revision)
    # Its progress bars last a second, one in each process, and break up ours.
    transformers_logging.disable_progress_bar()
    options = {"revision": source.revision, "trust_remote_code": trust_remote_code}
    number_type = resolve_dtype(dtype)
    with _hub_errors(name):
        config = AutoConfig.from_pretrained(source.location, **options)
        _check_is_causal(name, config)
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=number_type,
            attn_implementation=attention,
            use_safetensors=None if may_be_pickled else True,
            **options,
            **_build_quantization(quantization, number_type),
        )
    model.requires_grad_(False)
    if quantization != "none":
        _keep_differentiable(model)
    return Backbone(model=model, tokenizer=tokenizer, source=source)


def resolve_dtype(dtype: str) -> torch.dtype:
    """Return the torch type of ``llm.dtype``."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def _build_quantization(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Return transformers' arguments for quantization while loading, on the device where the weights will stay."""
    if quantization == "none":
        return {}
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"llm.quantization: {quantization} needs bitsandbytes, which is not installed; install it with "
            "pip install 'collm-dist[quantization]', or set llm.quantization to none"
        )
    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        # QLoRA's settings (Dettmers et al., 2023, section 3).
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def _keep_differentiable(model: Any) -> None:
    """Undo optimisations of bitsandbytes for inference.

    On CPUs with AVX512-BF16 a 4-bit layer repacks its weights in the first pass without gradients, such as stage 2's
    prefixes. After that no gradients flow through it, without any message. 8-bit layers log at every call that they
    round their inputs.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _check_is_causal(name: str, config: Any) -> None:
    """Refuse encoders and encoder-decoders, which transformers may load as another kind of model."""
    known = type(config) in AutoModelForCausalLM._model_mapping
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    declared = getattr(config, "architectures", None) or ["CausalLM"]
    if not (known or remote) or not any(
        "CausalLM" in architecture or "LMHead" in architecture for architecture in declared
    ):
        raise ConfigError(
            f"llm.backbone: '{name}' is a {config.model_type} model ({', '.join(declared)}), not a causal language "
            "model; choose one that transformers loads with AutoModelForCausalLM"
        )


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn the libraries' errors for a missing or damaged model into one with a remedy, except lack of memory."""
    try:
        yield
    except (CollmError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # tokenizers raise plain exceptions, safetensors its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"llm.backbone: '{name}' cannot be loaded ({reason}). Without access to the model hub, "
            "give a local folder with config.json, tokenizer and *.safetensors, or a .gguf file"
        ) from error
