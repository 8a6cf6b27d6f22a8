"""Results that a run takes from the run it extends (``dataset.extend_from``), step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from collm_dist.config import Config
from collm_dist.runs.run_dir import RunDir, Step

_PRODUCTS = {"cf": "model.safetensors", "stage2": "mapping.safetensors"}


def find_previous(config: Config) -> RunDir | None:
    """Return the run that this one extends, or None."""
    return None if config.dataset.extend_from is None else RunDir(Path(config.dataset.extend_from).absolute())


def find_previous_file(config: Config, step: Step) -> Path | None:
    """Return the weights of the earlier run's CF step or stage 2, for a warm start.

    Args:
        config: configuration of the new run.
        step: cf or stage2.

    Returns:
        The file; None if nothing is extended, the earlier run has not done the step, or ``cf.warm_start`` is off.
    """
    previous = find_previous(config)
    if previous is None or not previous.is_done(step) or not config.cf.warm_start:
        return None
    if step == "cf" and config.cf.model in ("table", "none"):  # not trained
        return None
    if step == "stage2" and config.stage2.train_cf == "scratch":  # new vectors need a new mapping
        return None
    return previous.step_dir(step) / _PRODUCTS[step]


def compares_with_previous(config: Config) -> bool:
    """Return whether the earlier run's stage 2 also scores the new run's rows."""
    previous = find_previous(config)
    is_rule_set = config.promotion.min_paired_difference is not None and config.promotion.baseline == "previous"
    return is_rule_set and previous is not None and previous.is_done("stage2")


def describe_previous_step(config: Config, step: Step) -> dict[str, Any]:
    """Return the content hashes of the earlier run that a step depends on, by name, for its fingerprint.

    Raises:
        ArtifactError: the earlier run's record is damaged.
    """
    previous = find_previous(config)
    if previous is None:
        return {}
    if step in _PRODUCTS:
        used = find_previous_file(config, step) is not None
    else:
        used = compares_with_previous(config) if step == "eval" else False
    origin: Step = "stage2" if step == "eval" else step
    return {f"previous.{origin}": previous.read_content_hash(origin)} if used else {}
