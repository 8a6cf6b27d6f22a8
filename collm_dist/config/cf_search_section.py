"""Settings of a search for the best CF settings."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, field_validator

from collm_dist.config.cf_section import CfConfig
from collm_dist.config.section import Section, operational

# Settings that a search must not choose, with the reason.
NOT_SEARCHED = {
    "select_metric": "trials are compared by it",
    "num_epochs": "all trials have the same limit, and the best epoch of each counts",
    "seeds": "a search would pick a lucky seed",
    "cross_fit": "trials fit one model to all training rows",
    "warm_start": "trials start from random weights",
    "fold_epochs": "trials fit one model to all training rows",
    "num_workers": "it does not change the results",
    "checkpoint_every_epochs": "it does not change the results",
}
SearchSpace = dict[str, dict[Literal["choice", "uniform", "log_uniform", "integer"], tuple[Any, ...]]]
DEFAULT_SPACE: SearchSpace = {
    "learning_rate": {"log_uniform": (3e-4, 3e-2)},
    "weight_decay": {"log_uniform": (0.1, 300.0)},
    "init_scale": {"log_uniform": (0.01, 0.3)},
}


class CfSearchConfig(Section):
    """Search for CF settings (launch/search.py --step cf). The other steps do not read this section."""

    space: SearchSpace = Field(
        DEFAULT_SPACE,
        description="Settings of the cf section and their domains: {choice: [a, b, ...]}, {uniform: [low, high]}, "
        "{log_uniform: [low, high]} or {integer: [low, high]}, bounds included.",
    )
    num_trials: int = Field(30, ge=1, description="Number of trials; the first one has the settings of the cf section.")
    grace_epochs: int = Field(5, ge=1, description="Epochs before ASHA may stop a trial.")
    reduction_factor: int = Field(3, ge=2, description="ASHA keeps one in this many trials at each rung.")
    parallel_trials: int | None = operational(
        None, "Concurrent trials; default: one per GPU, or one per CPU without GPUs.", ge=1
    )

    @field_validator("space")
    @classmethod
    def _check_space(cls, space: SearchSpace) -> SearchSpace:
        if not space:
            raise ValueError("is empty: name at least one setting of the cf section")
        for name, domain in space.items():
            if name not in CfConfig.model_fields:
                matches = difflib.get_close_matches(name, CfConfig.model_fields, n=1)
                raise ValueError(
                    f"{name} is not a setting of the cf section" + (f"; did you mean {matches[0]}?" if matches else "")
                )
            if name in NOT_SEARCHED:
                raise ValueError(f"{name}: {NOT_SEARCHED[name]}")
            check_domain(name, domain)
        return space


def check_domain(name: str, domain: dict[Any, tuple[Any, ...]]) -> None:
    """Raise ValueError, with the setting's name, unless the domain of a search space is valid."""
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
