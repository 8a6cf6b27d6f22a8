"""Optuna study of a search for stage settings: its trials, their parameters and their configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from collm_dist.cf.search_space import Settings
from collm_dist.config import Config
from collm_dist.config.cf_search_section import SearchSpace
from collm_dist.config.loader import change_settings, get_setting
from collm_dist.orchestration.leaderboard import Trial
from collm_dist.random_keys import hash_integers


@dataclass(frozen=True)
class TrialConfigs:
    """Configurations of trials, from the parameters that the sampler draws.

    Attributes:
        config: the experiment.
        space: searched settings and their domains; of a choice the sampler draws the index.
    """

    config: Config
    space: SearchSpace

    def read_settings(self, parameters: Mapping[str, Any]) -> Settings:
        """Return the settings by dotted name."""
        return {
            name: form["choice"][parameters[name]] if "choice" in form else parameters[name]
            for name, form in self.space.items()
        }

    def build(self, parameters: Mapping[str, Any]) -> Config:
        """Return the configuration of a trial."""
        return change_settings(self.config, self.read_settings(parameters))


def open_study(configs: TrialConfigs, folder: Path) -> optuna.Study:
    """Open the study of a search; trials that ran when it was killed are queued again with their numbers."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = configs.config.stage_search
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "journal.jsonl"))),
        study_name="search",
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.SuccessiveHalvingPruner(search.grace_validations, search.reduction_factor),
    )
    seed = _derive_seed(configs.config.run.seed, len(study.trials))
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    if not study.trials and (own := _find_own(configs)) is not None:
        study.enqueue_trial(own, user_attrs={"number": 0, "is_own": True})
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _derive_seed(seed: int, num_trials: int) -> int:
    """Return the sampler's seed. A sampler starts its random stream from the seed, so each resume needs another one."""
    return seed if num_trials == 0 else int(hash_integers(seed, num_trials) >> np.uint64(32))


def list_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the last attempt at each trial, by its number; Optuna counts attempts."""
    last = {trial.user_attrs["number"]: trial for trial in study.trials if "number" in trial.user_attrs}
    return [last[number] for number in sorted(last)]


def build_trial(configs: TrialConfigs, trial: FrozenTrial) -> Trial:
    """Return the result of the last attempt at a trial."""
    report = trial.user_attrs.get("report", {})
    built = Trial.from_report(
        trial.user_attrs["number"], configs.read_settings(trial.params), report, trial.user_attrs.get("error", "")
    )
    return Trial(**{**vars(built), "is_own": trial.user_attrs.get("is_own", False)})


def _find_own(configs: TrialConfigs) -> dict[str, Any] | None:
    """Return the sampler's parameters of the config's own settings, or None if they are not in the space."""
    parameters = {}
    for name, form in configs.space.items():
        ((kind, values),) = form.items()
        value = get_setting(configs.config, name)
        if kind == "choice":
            plain = json.loads(json.dumps(values))
            if value not in plain:
                return None
            parameters[name] = plain.index(value)
        elif not isinstance(value, int | float) or not values[0] <= value <= values[1]:  # such as null or auto
            return None
        else:
            parameters[name] = value
    return parameters


def build_distribution(form: Mapping[Any, tuple[Any, ...]]) -> optuna.distributions.BaseDistribution:
    """Return Optuna's distribution for a domain. For a choice the sampler draws the index of a value."""
    ((kind, values),) = form.items()
    if kind == "choice":
        return optuna.distributions.CategoricalDistribution(list(range(len(values))))
    low, high = values
    if kind == "integer":
        return optuna.distributions.IntDistribution(low, high)
    return optuna.distributions.FloatDistribution(low, high, log=kind == "log_uniform")
