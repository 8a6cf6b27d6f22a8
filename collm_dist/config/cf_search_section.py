"""Settings of a search for the best CF settings."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, field_validator

from collm_dist.config.cf_section import CfConfig
from collm_dist.config.section import Section, operational

# Settings that a search cannot choose, and why.
NOT_SEARCHED = {
    "select_metric": "it is what trials are compared by",
    "num_epochs": "every trial may train for the same number of epochs, and its best one counts",
    "seeds": "a lucky seed is no setting",
    "cross_fit": "trials fit one model to all training rows",
    "warm_start": "trials begin from nothing",
    "fold_epochs": "trials fit one model to all training rows",
    "num_workers": "it does not change what comes out",
    "checkpoint_every_epochs": "it does not change what comes out",
}
SearchSpace = dict[str, dict[Literal["choice", "uniform", "log_uniform", "integer"], tuple[Any, ...]]]
DEFAULT_SPACE: SearchSpace = {
    "learning_rate": {"log_uniform": (3e-4, 3e-2)},
    "weight_decay": {"log_uniform": (0.1, 300.0)},
    "init_scale": {"log_uniform": (0.01, 0.3)},
}


class CfSearchConfig(Section):
    """A search for the CF model's settings (launch/search_cf.py). The other steps do not read it."""

    space: SearchSpace = Field(
        DEFAULT_SPACE,
        description="Settings of the cf section and where to look: {choice: [a, b, ...]}, {uniform: [low, high]}, "
        "{log_uniform: [low, high]} or {integer: [low, high]}, ends included.",
    )
    num_trials: int = Field(30, ge=1, description="Settings tried, the first being those of the cf section itself.")
    grace_epochs: int = Field(5, ge=1, description="Epochs before ASHA may stop a trial.")
    reduction_factor: int = Field(3, ge=2, description="ASHA keeps one trial in so many at each rung.")
    parallel_trials: int | None = operational(
        None, "Trials at once; default: one per CPU (per GPU if there are).", ge=1
    )

    @field_validator("space")
    @classmethod
    def _check_space(cls, space: SearchSpace) -> SearchSpace:
        if not space:
            raise ValueError("names no setting: there is nothing to look for")
        for name, domain in space.items():
            if name not in CfConfig.model_fields:
                matches = difflib.get_close_matches(name, CfConfig.model_fields, n=1)
                raise ValueError(
                    f"{name} is no setting of the cf section" + (f"; did you mean {matches[0]}?" if matches else "")
                )
            if name in NOT_SEARCHED:
                raise ValueError(f"{name}: {NOT_SEARCHED[name]}")
            _check_domain(name, domain)
        return space


def _check_domain(name: str, domain: dict[Any, tuple[Any, ...]]) -> None:
    if len(domain) != 1:
        raise ValueError(f"{name}: takes one of choice, uniform, log_uniform and integer, found {len(domain)}")
    ((kind, values),) = domain.items()
    if kind == "choice":
        if not values:
            raise ValueError(f"{name}: choice is empty")
        return
    numbers = int if kind == "integer" else (int, float)
    if len(values) != 2 or not all(isinstance(value, numbers) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{name}: {kind} takes two {'whole ' * (kind == 'integer')}numbers, [low, high]: {[*values]}")
    if not values[0] < values[1] or (kind == "log_uniform" and values[0] <= 0):
        order = "0 < low < high" if kind == "log_uniform" else "low < high"
        raise ValueError(f"{name}: {kind} needs {order}: {[*values]}")
