"""The settings that a search tries: drawn before it begins, so that a wrong one is refused while nothing runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import ValidationError

from collm_dist.config import CfConfig, CfSearchConfig
from collm_dist.errors import ConfigError

Settings = dict[str, Any]


def draw_settings(cf: CfConfig, search: CfSearchConfig, seed: int) -> list[Settings]:
    """Return the settings of each trial: first those of the config itself, then random ones.

    Args:
        cf: what the search starts from.
        search: where to look.
        seed: that trials are drawn from.

    Raises:
        ConfigError: a value that could be drawn is none that its setting takes; the message names the setting.
    """
    for name, form in search.space.items():
        ((kind, values),) = form.items()
        for value in values:
            try:
                apply_settings(cf, {name: value}, part=name)
            except ConfigError as error:
                raise ConfigError(f"cf_search.space.{name}.{kind}: {error}") from None
    random = np.random.default_rng(seed)
    trials = [{name: getattr(cf, name) for name in search.space}]
    for number in range(1, search.num_trials):
        trials.append({name: _draw(form, random) for name, form in search.space.items()})
        try:
            apply_settings(cf, trials[number])
        except ConfigError as error:
            raise ConfigError(
                f"cf_search.space: trial {number} ({describe_settings(trials[number])}): {error}"
            ) from None
    return trials


def apply_settings(cf: CfConfig, settings: Settings, part: str | None = None) -> CfConfig:
    """Return the cf section with some settings replaced.

    Args:
        cf: the section.
        settings: by name.
        part: look at this setting alone: how it goes with the others is not judged.

    Raises:
        ConfigError: a value is none that its setting takes.
    """
    try:
        return CfConfig.model_validate(cf.model_dump() | settings)
    except ValidationError as error:
        details = [one for one in error.errors() if part is None or one["loc"][:1] == (part,)]
        if not details:
            return cf
        detail = details[0]
        message = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"]
        raise ConfigError(f"{message.replace('Input should', 'should', 1)} ({detail['input']!r})") from None


def _draw(form: dict[Any, tuple[Any, ...]], random: np.random.Generator) -> Any:
    ((kind, values),) = form.items()
    if kind == "choice":
        return values[random.integers(len(values))]
    low, high = values
    if kind == "integer":
        return int(random.integers(low, high, endpoint=True))
    if kind == "uniform":
        return _shorten(random.uniform(low, high), low, high)
    return _shorten(math.exp(random.uniform(math.log(low), math.log(high))), low, high)


def _shorten(value: float, low: float, high: float) -> float:
    """Three digits: more say nothing about a setting, and nobody copies them."""
    return min(max(float(f"{value:.3g}"), low), high)


def describe_settings(settings: Settings) -> str:
    """Return settings on one line."""
    return " ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                    for name, value in settings.items())  # fmt: skip
