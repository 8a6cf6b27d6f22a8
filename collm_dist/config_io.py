"""Loading a configuration: defaults < YAML < ``section.key=value``, with every mistake at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from collm_dist.config import Config
from collm_dist.errors import ConfigError

# What people coming from other trainers type, and what it is called here.
FOREIGN_NAMES: dict[str, str] = {
    "output_dir": "run.dir",
    "seed": "run.seed",
    "per_device_train_batch_size": "stage1.global_batch_size (rows a step, over all processes)",
    "per_device_eval_batch_size": "evaluation.max_tokens_per_micro_batch",
    "train_batch_size": "stage1.global_batch_size (rows a step, over all processes)",
    "train_micro_batch_size_per_gpu": "stage1.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "stage1.max_tokens_per_micro_batch (accumulation follows from it)",
    "gradient_checkpointing": "llm.activation_checkpointing",
    "gradient_clipping": "stage1.max_grad_norm",
    "num_train_epochs": "stage1.num_epochs",
    "max_steps": "stage1.max_steps",
    "lr": "stage1.learning_rate",
    "learning_rate": "stage1.learning_rate",
    "weight_decay": "stage1.weight_decay",
    "warmup_ratio": "stage1.warmup_steps",
    "warmup_steps": "stage1.warmup_steps",
    "eval_steps": "stage1.eval_every_steps",
    "save_steps": "stage1.checkpoint_every_steps",
    "logging_steps": "monitoring.log_every_steps",
    "model_name_or_path": "llm.backbone",
    "torch_dtype": "llm.dtype",
    "bf16": "llm.dtype",
    "fp16": "llm.dtype",
    "attn_implementation": "llm.attention",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "deepspeed": "cluster.deepspeed_extra",
    "zero_optimization": "cluster.zero_stage",
    "zero_stage": "cluster.zero_stage",
}


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, and a key given twice is a mistake."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"'{key}' is given twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Load and check a configuration.

    Args:
        path: the YAML file.
        overrides: ``section.key=value``, values in YAML.

    Raises:
        ConfigError: the file cannot be read or something in it is wrong; the message lists every mistake.
    """
    document = _read_yaml(Path(path))
    mistakes = [line for override in overrides for line in _apply(document, override)]
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        mistakes += [_explain(dict(one)) for one in error.errors()]
    if mistakes:
        listed = "\n".join(f"  {line}" for line in dict.fromkeys(mistakes))
        raise ConfigError(f"{path}: {len(mistakes)} mistake(s):\n{listed}")
    return config


def list_fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting as (dotted path, pydantic field), in the order of the sections."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from list_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no valid YAML: {error}") from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be understood: {type(error).__name__}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected sections (run:, dataset:, ...), found {type(document).__name__}")
    return document


def _apply(document: dict[str, Any], override: str) -> Iterator[str]:
    """Put one override into the document, or yield what is wrong with it."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        yield f"{override}: expected section.key=value"
        return
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        yield f"{dotted}: the value {text!r} is no valid YAML"
        return
    target: Any = document
    *parents, last = dotted.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            yield f"{dotted}: '{parent}' is no section"
            return
    target[last] = value


def _explain(error: Mapping[str, Any]) -> str:
    """Return one line for one of pydantic's errors: path, what is wrong, the nearest valid name."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{path}: required, but not given"
    if error["type"] != "extra_forbidden":
        message = str(error["msg"]).removeprefix("Value error, ")
        simple = isinstance(error["input"], str | int | float | bool)
        return f"{path or 'config'}: {message}" + (f" (is {error['input']!r})" if simple else "")
    name = str(error["loc"][-1])
    if name in FOREIGN_NAMES:
        return f"{path}: no such setting; here it is {FOREIGN_NAMES[name]}"
    known = [field for field, _ in list_fields()] + list(Config.model_fields)
    siblings = {field.rsplit(".", 1)[-1]: field for field in reversed(known)}
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    near = near or [siblings[one] for one in difflib.get_close_matches(name, siblings, n=1)]
    return f"{path}: no such setting" + (f"; did you mean {near[0]}?" if near else "; see configs/README.md")
