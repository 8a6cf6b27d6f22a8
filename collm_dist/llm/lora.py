"""The weights that stage 1 trains: LoRA adapters through peft, or all of the layers. No other file imports peft."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from collm_dist.errors import ConfigError
from collm_dist.llm.packed.decoder import find_decoder, find_layers

TargetModules = tuple[str, ...] | Literal["all"]
Rank = int | Literal["full"]


def make_trainable(
    backbone: Any, *, rank: Rank, alpha: int, dropout: float, target_modules: TargetModules, seed: int
) -> PeftModel | None:
    """Choose the weights of a frozen backbone that train, in place: those of a new adapter, or of all decoder layers.

    Embeddings and the output head stay frozen: of the head only the two rows of the answers are computed.

    Args:
        backbone, alpha, dropout, target_modules, seed: as for ``add_lora``, whose errors this raises too.
        rank: of the adapter; ``full``: all weights of the decoder layers train, and the other arguments have no effect.

    Returns:
        peft's wrapper, see ``add_lora``; None if the layers themselves train.
    """
    if rank == "full":
        for layer in find_layers(find_decoder(backbone)) or ():
            layer.requires_grad_(True)
        return None
    return add_lora(backbone, rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, seed=seed)


def add_lora(
    backbone: Any, *, rank: int, alpha: int, dropout: float, target_modules: TargetModules, seed: int
) -> PeftModel:
    """Add a new adapter to the backbone's layers, in place; only the adapter is trainable.

    Args:
        backbone: a transformers causal language model.
        rank, alpha, dropout, target_modules: as in ``LoraConfig``.
        seed: of the adapter's initial weights.

    Returns:
        peft's wrapper around the same backbone, which ``save_adapter`` needs.

    Raises:
        ConfigError: see ``find_target_modules``.
    """
    names = find_target_modules(backbone, target_modules)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), _hide_deprecation():
        torch.manual_seed(seed)
        # In the backbone's precision, which DeepSpeed would give it anyway: trial passes before DeepSpeed then measure
        # what will be trained, and compiled layers stay valid.
        return get_peft_model(backbone, config, autocast_adapter_dtype=False)


def find_target_modules(backbone: Any, target_modules: TargetModules) -> list[str]:
    """Return names of linear layers that an adapter can train, or ends of their full names.

    Args:
        backbone: a transformers causal language model; it may be on the meta device.
        target_modules: names of layers, or ends of their full names; ``all``: the linear layers of all decoder layers.
            Those of a mixture of experts are left out, since each of them sees a part of the tokens.

    Raises:
        ConfigError: no layer has one of the names, or the layers of a name cannot be trained.
    """
    head = backbone.get_output_embeddings()
    layers = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if target_modules == "all":
        return _list_decoder_layers(backbone, layers)
    trainable = sorted({_get_last(name) for name, module in layers.items() if module is not head})
    for target in target_modules:
        found = [module for name, module in layers.items() if f".{name}".endswith(f".{target}")]
        if not found:
            matches = difflib.get_close_matches(target, trainable, n=1)
            hint = f"did you mean {matches[0]}? " if matches else ""
            raise ConfigError(
                f"lora.target_modules: no linear layer of this backbone is named {target}; {hint}its linear layers are "
                f"{', '.join(trainable)}"
            )
        if any(module is head for module in found):
            raise ConfigError(
                f"lora.target_modules: {target} is the output head, of which only the two rows of the answers are "
                f"computed, so its adapter would not be trained; remove it. Other linear layers: {', '.join(trainable)}"
            )
    return list(target_modules)


def _list_decoder_layers(backbone: Any, linear_layers: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the linear layers of all decoder layers; a name that other modules share is a full one.

    Raises:
        ConfigError: there are none.
    """
    inside: set[nn.Module] = set()
    mixed: set[nn.Module] = set()
    for layer in find_layers(find_decoder(backbone)) or ():
        inside.update(layer.modules())
        mixed.update(*(module.modules() for module in layer.modules() if hasattr(module, "experts")))
    full = [name for name, module in linear_layers.items() if module in inside - mixed]
    # peft adapts parameters by these names too, such as the fused weights of experts.
    names = {name for name, _ in (*backbone.named_modules(), *backbone.named_parameters())}
    shared = {_get_last(name) for name in names.difference(full)}
    if mixed:  # peft takes even full names of such layers for those of experts
        full = [name for name in full if _get_last(name) not in shared]
    if not full:
        raise ConfigError(
            "lora.target_modules: all finds no linear layer outside mixtures of experts; name layers, of "
            f"{', '.join(sorted({_get_last(name) for name in linear_layers}))}"
        )
    return sorted({name if _get_last(name) in shared else _get_last(name) for name in full})


def _get_last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def save_adapter(
    wrapper: PeftModel, folder: Path, weights: Mapping[str, Tensor], base_model: str, revision: str | None
) -> None:
    """Write the adapter so that ``PeftModel.from_pretrained(base, folder)`` loads it.

    Args:
        wrapper: result of ``add_lora``.
        folder: to write to.
        weights: full (unpartitioned) adapter weights by their names in the backbone.
        base_model, revision: of the adapter; a hub id or a named backbone, never a path of this machine.
    """
    config = wrapper.peft_config["default"]
    config.base_model_name_or_path, config.revision = base_model, revision
    state = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
    # Without save_embedding_layers=False peft asks the hub whether the vocabulary has grown.
    wrapper.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    card, location = folder / "README.md", str(getattr(wrapper.config, "_name_or_path", "") or "")
    if card.exists() and Path(location).is_absolute():  # peft names the folder of the backbone there
        card.write_text(card.read_text(encoding="utf-8").replace(location, base_model), encoding="utf-8")


def load_adapter(backbone: Any, folder: Path) -> PeftModel:
    """Load an adapter into a backbone, in place, frozen."""
    with _hide_deprecation():
        return PeftModel.from_pretrained(backbone, str(folder))


@contextmanager
def _hide_deprecation() -> Iterator[None]:
    """Hide a deprecation warning of transformers that concerns a call inside peft."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def merge_adapter(backbone: Any, folder: Path) -> Any:
    """Return the backbone with an adapter added to its weights and removed.

    The sum is computed in float32 and then rounded to the backbone's precision.
    """
    dtype = backbone.dtype
    merged = load_adapter(backbone.float(), folder).merge_and_unload(safe_merge=True)
    return merged.to(dtype)
