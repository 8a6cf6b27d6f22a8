"""Fingerprints of steps: config fields, content hashes of earlier steps, and input files, compared with the record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from collm_dist.config import Config
from collm_dist.errors import ArtifactError, CheckpointError
from collm_dist.runs.input_files import is_same_input
from collm_dist.runs.run_dir import RunDir, Step

# Config fields of each step, as dotted prefixes. Operational fields are excluded by flatten_config.
STEP_FIELDS: dict[Step, tuple[str, ...]] = {
    "data": ("run.seed", "dataset", "preprocessing", "evaluation.num_candidates"),
    "cf": ("run.seed", "cf"),
    "stage1": ("run.seed", "anchor", "prompt", "llm", "lora", "stage1"),
    "stage2": ("run.seed", "anchor", "prompt", "llm", "mapping", "stage2"),
    "eval": ("run.seed", "evaluation", "promotion.baseline"),
}


# Versions of tables, which the entries of the inputs hold, whether they were set or found.
TABLE_VERSIONS = tuple(
    f"dataset.{prefix}{name}" for prefix in ("", "item_", "user_") for name in ("version", "snapshot_id")
)


# Exceptions below those prefixes: fields that the step does not read, or that stand among its inputs.
STEP_FIELDS_EXCLUDED: dict[Step, tuple[str, ...]] = {
    "data": ("dataset.expect", *TABLE_VERSIONS),
    "cf": (),
    "stage1": ("prompt.stage2",),
    "stage2": ("prompt.stage1",),
    "eval": (),
}


UPSTREAM: dict[Step, tuple[Step, ...]] = {
    "data": (),
    "cf": ("data",),
    "stage1": ("data", "cf"),
    "stage2": ("data", "cf", "stage1"),
    "eval": ("data", "cf", "stage1", "stage2"),
}


def flatten_config(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return the non-operational fields as ``{dotted path: JSON value}``, without optional fields that are not set."""
    flat: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("operational"):
            continue
        value = getattr(config, name)
        if value is None and isinstance(extra, dict) and extra.get("optional"):
            continue
        if isinstance(value, BaseModel):
            flat.update(flatten_config(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = json.loads(json.dumps(value))
    return flat


def compute_fingerprint(
    config: Config,
    step: Step,
    run_dir: RunDir,
    inputs: Mapping[str, Any] | None = None,
    *,
    skip_missing: bool = False,
) -> dict[str, Any]:
    """Return the fingerprint of a step for the current configuration and inputs.

    Args:
        config: the experiment.
        step: the step.
        run_dir: run directory with the records of earlier steps.
        inputs: other dependencies, such as input files with size and modification time, or prompt texts.
        skip_missing: omit unfinished steps instead of raising; evaluation reports whatever is finished.

    Raises:
        ArtifactError: an earlier step is not done, or its record is damaged.
    """

    def covers(prefixes: tuple[str, ...], key: str) -> bool:
        return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)

    included, excluded = STEP_FIELDS[step], STEP_FIELDS_EXCLUDED[step]
    fingerprint = {
        f"config.{key}": value
        for key, value in flatten_config(config).items()
        if covers(included, key) and not covers(excluded, key)
    }
    for upstream in UPSTREAM[step]:
        if upstream == "stage1" and not config.stage1.enabled:
            continue
        if (step, upstream) == ("stage1", "cf") and config.anchor.kind not in ("cf", "blend"):
            continue
        if skip_missing and not run_dir.is_done(upstream):
            continue
        fingerprint[f"upstream.{upstream}"] = run_dir.read_content_hash(upstream)
    for key, value in (inputs or {}).items():
        fingerprint[f"input.{key}"] = json.loads(json.dumps(value))
    return fingerprint


def find_changes(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return a line ``key: old -> new`` for each key in which two fingerprints differ (files by their content)."""
    return [
        f"{key}: {recorded.get(key, '(absent)')} -> {current.get(key, '(absent)')}"
        for key in sorted(set(recorded) | set(current))
        if not is_same_input(recorded.get(key), current.get(key))
    ]


def is_step_current(run_dir: RunDir, step: Step, fingerprint: Mapping[str, Any], remedy: str | None = None) -> bool:
    """Return whether the step is done with this fingerprint.

    Args:
        run_dir: the run.
        step: the step.
        fingerprint: of the step with today's settings and inputs.
        remedy: command or argument that redoes the step; default ``--force STEP``.

    Raises:
        ArtifactError: it is done with another fingerprint; the message names the differing keys and the remedies.
    """
    if not run_dir.is_done(step):
        return False
    changes = find_changes(run_dir.read_record(step).get("fingerprint", {}), fingerprint)
    if changes:
        remedy = (remedy or f"--force {step}") + ("" if step == "eval" else "; later steps follow")
        raise ArtifactError(
            f"step '{step}' in {run_dir.path} was made with other settings or inputs:\n  "
            + "\n  ".join(changes)
            + f"\nEither redo it ({remedy}) or set run.dir to a new directory."
        )
    return True


def is_report_current(run_dir: RunDir, fingerprint: Mapping[str, Any], remedy: str | None = None) -> bool:
    """Return whether the report is done with this fingerprint; if only steps have been added since, it is out of date.

    Arguments as for ``is_step_current``.

    Raises:
        ArtifactError: it is done with another fingerprint, see ``is_step_current``.
    """
    if run_dir.is_done("eval"):
        recorded = run_dir.read_record("eval").get("fingerprint", {})
        added = {key for key in fingerprint if key not in recorded and key.startswith("upstream.")}
        if added and not find_changes(recorded, {key: fingerprint[key] for key in fingerprint if key not in added}):
            return False
    return is_step_current(run_dir, "eval", fingerprint, remedy)


def check_checkpoint_fingerprint(path: Path, recorded: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other settings or data.

    Raises:
        CheckpointError: the fingerprints differ; the message names the differing keys and the remedies.
    """
    if changes := find_changes(recorded, fingerprint):
        raise CheckpointError(
            f"{path} was made from other settings or data:\n  "
            + "\n  ".join(changes)
            + "\nStart over with --force, or set run.dir to a new directory."
        )
