"""Loading a configuration: defaults < YAML < ``section.key=value``, with every mistake at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from collm_dist.config import Config
from collm_dist.errors import ConfigError


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Load and check a configuration.

    Raises:
        ConfigError: the file cannot be read or something in it is wrong; the message lists every mistake.
    """
    document: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    for override in overrides:
        dotted, _, value = override.partition("=")
        target = document
        *parents, last = dotted.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = yaml.safe_load(value)
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise ConfigError(str(error)) from None
