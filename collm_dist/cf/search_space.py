"""Trials of a hyperparameter search: all settings are drawn and validated before any trial starts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import ValidationError

from collm_dist.config import CfConfig, Config
from collm_dist.config.loader import change_settings
from collm_dist.errors import ConfigError

Settings = dict[str, Any]


def draw_settings(config: Config) -> list[Settings]:
    """Return the settings of each trial: the config's own first, then random ones, drawn with ``run.seed``.

    Args:
        config: the experiment; trials change its ``cf`` section as ``cf_search`` says.

    Raises:
        ConfigError: a value in the search space is invalid, or a trial's configuration as a whole, which also holds
            settings that other sections limit; the message names the setting.
    """
    space = config.cf_search.space
    for name, form in space.items():
        ((kind, values),) = form.items()
        for value in values:
            _check_value(config.cf, name, value, f"cf_search.space.{name}.{kind}")
    random = np.random.default_rng(config.run.seed)
    trials = [{name: getattr(config.cf, name) for name in space}]
    for number in range(1, config.cf_search.num_trials):
        trials.append({name: _draw(form, random) for name, form in space.items()})
        try:
            apply_settings(config, trials[number])
        except ConfigError as error:
            raise ConfigError(
                f"cf_search.space: trial {number} ({describe_settings(trials[number])}): "
                f"{str(error).removeprefix('cf: ')}; or search other values"
            ) from None
    return trials


def apply_settings(config: Config, settings: Settings) -> Config:
    """Return the configuration with new values of settings of its ``cf`` section.

    Raises:
        ConfigError: the configuration is invalid with them.
    """
    return change_settings(config, {f"cf.{name}": value for name, value in settings.items()})


def _check_value(cf: CfConfig, name: str, value: Any, place: str) -> None:
    """Refuse a value that is invalid with any others; its combinations are checked once trials are drawn."""
    if name == "model" and value == "none":
        raise ConfigError(f"{place}: cf.model 'none' is not trained; leave it out")
    try:
        CfConfig.model_validate(cf.model_dump() | {name: value})
    except ValidationError as error:
        for detail in error.errors():
            if detail["loc"][:1] == (name,):
                message = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"]
                message = message.replace("Input should", "should", 1)
                raise ConfigError(f"{place}: {message} ({detail['input']!r})") from None


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
