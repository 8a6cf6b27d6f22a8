"""What a run's anchor was made from, compared with today's data and collaborative model. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from collm_dist.config import Config
from collm_dist.config.anchor_section import RECENT_SHARE
from collm_dist.errors import ArtifactError
from collm_dist.runs.run_dir import RunDir

FORMAT_VERSION = 3


def find_anchor_record(run_dir: RunDir) -> Path:
    """Return the path of the record of a run's anchor, which is written last."""
    return run_dir.anchor_dir / "anchor.json"


def get_recent_share(config: Config) -> float:
    """Return ``anchor.recent_share``; its default too for the blend of a report without an anchor."""
    return RECENT_SHARE if config.anchor.recent_share is None else config.anchor.recent_share


def reads_cf(config: Config, run_dir: RunDir, kind: str) -> bool:
    """Return whether an anchor of a kind reads the CF model.

    The blend of a report leaves out a model that has seen the labels of the training rows, or is not trained yet.
    """
    if kind == "blend" and (config.cf.model == "none" or config.cf.cross_fit == "off" or not run_dir.is_done("cf")):
        return False
    return kind in ("cf", "blend")


def list_anchor_inputs(config: Config, run_dir: RunDir, kind: str) -> dict[str, Any]:
    """Return the settings of the anchor, and the content hashes of the data and the CF model that it is made from.

    Raises:
        ArtifactError: the data step, or a CF step that the anchor reads, is not done or damaged.
    """
    data, share = run_dir.read_content_hash("data"), get_recent_share(config)
    inputs: dict[str, Any] = {"kind": kind, "recent_share": share, "data": data}
    if reads_cf(config, run_dir, kind):
        inputs["cf"] = run_dir.read_content_hash("cf")
    return inputs


def is_anchor_current(config: Config, run_dir: RunDir) -> bool:
    """Return whether the run has the configured anchor for today's data and CF model; True if it needs none.

    Raises:
        ArtifactError: see ``list_anchor_inputs``.
    """
    return _find_difference(config, run_dir) is None


def check_anchor(config: Config, run_dir: RunDir) -> None:
    """Check that the run has the configured anchor for today's data and CF model, if it needs one.

    Raises:
        ArtifactError: it is missing or belongs to other data, settings or another CF model; or see
            ``list_anchor_inputs``.
    """
    if difference := _find_difference(config, run_dir):
        raise ArtifactError(f"{find_anchor_record(run_dir)} {difference}")


def _find_difference(config: Config, run_dir: RunDir) -> str | None:
    """Return why the run's anchor is not the configured one, and the remedy; None if it is, or none is needed."""
    kind, again = config.anchor.kind, "run the pipeline or the stage again, which makes the anchor"
    if kind is None:
        return None
    wanted = list_anchor_inputs(config, run_dir, kind)
    try:
        record = json.loads(find_anchor_record(run_dir).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return f"is missing or damaged: restore the folder from a copy, or {again}"
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        return f"was written by another version of this program: use that version, or {again}"
    return None if record.get("inputs") == wanted else f"belongs to other data or settings: {again}"
