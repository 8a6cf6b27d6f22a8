"""Trials of a hyperparameter search: all settings are drawn and validated before any trial starts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import ValidationError

from collm_dist.config import CfConfig, CfSearchConfig
from collm_dist.errors import ConfigError

Settings = dict[str, Any]


def draw_settings(cf: CfConfig, search: CfSearchConfig, seed: int) -> list[Settings]:
    """Return the settings of each trial: the config's own first, then random ones.

    Args:
        cf: section that the trials change.
        search: search space and number of trials.
        seed: of the draws.

    Raises:
        ConfigError: a value in the search space is invalid; the message names the setting.
    """
    for name, form in search.space.items():
        ((kind, values),) = form.items()
        for value in values:
            try:
                apply_settings(cf, {name: value}, only=name)
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


def apply_settings(cf: CfConfig, settings: Settings, only: str | None = None) -> CfConfig:
    """Return the cf section with new values of some settings.

    Args:
        cf: the section.
        settings: new values by name.
        only: check this setting alone, not its combination with the others.

    Raises:
        ConfigError: a value is invalid.
    """
    try:
        return CfConfig.model_validate(cf.model_dump() | settings)
    except ValidationError as error:
        details = [detail for detail in error.errors() if only is None or detail["loc"][:1] == (only,)]
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
    """Round to three significant digits, which is as precise as a setting needs to be."""
    return min(max(float(f"{value:.3g}"), low), high)


def describe_settings(settings: Settings) -> str:
    """Return the settings as one line."""
    return " ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                    for name, value in settings.items())  # fmt: skip
