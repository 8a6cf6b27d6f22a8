"""Fingerprints of the steps: everything their results depend on. Needs no tensor library, model or cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from collm_dist.config import CfConfig, Config
from collm_dist.data.ingest.id_tables import describe_previous
from collm_dist.data.ingest.new_events import leave_out_later_parts
from collm_dist.data.ingest.source import Source, open_source
from collm_dist.data.ingest.user_texts import open_user_file
from collm_dist.data.prompt_needs import check_prompt_needs
from collm_dist.data.prompts.prompt_template import load_prompt_text
from collm_dist.data.table_pins import pin_tables
from collm_dist.runs.fingerprints import compute_fingerprint
from collm_dist.runs.input_files import describe_file, describe_inputs, keep_old_entries
from collm_dist.runs.previous_run import describe_previous_step
from collm_dist.runs.run_dir import STAGES, RunDir, Step
from collm_dist.storage import describe_files, list_files

# Entry of the data step whose shards hold the order of likes and dislikes.
ORDER_INPUT = "input.order of likes and dislikes"


def compute_step_fingerprint(
    config: Config, run_dir: RunDir, step: Step, source: Source | None = None
) -> dict[str, Any]:
    """Return a step's fingerprint.

    Args:
        config: the experiment.
        run_dir: holds the finished earlier steps; missing ones are skipped for evaluation.
        step: the step to describe.
        source: the log that a data step is about to read. Without it, a finished data step is described: parts of
            ``dataset.new_events`` that have arrived since are left out, and tables have the versions that it read.

    Raises:
        ArtifactError: an earlier step is not done.
        DataError: the input is missing.
        ConfigError: a prompt file is missing.
    """
    if step == "data":
        needs_order = check_prompt_needs(config)
        opened = source or open_source(pin_tables(config.dataset, run_dir))
        states, recorded = opened.describe_inputs(), _read_fingerprint(run_dir, "data")
        if source is None:
            states = leave_out_later_parts(config.dataset, states, recorded)
        if (user_file := open_user_file(opened.dataset)) is not None:
            states |= user_file.inputs()
        if config.dataset.forget is not None:
            states |= describe_files(list_files(config.dataset.forget, "dataset.forget"))
        inputs = describe_inputs(states, recorded)
        if needs_order or ORDER_INPUT in recorded:  # shards with more than the prompts need stay valid
            inputs |= {ORDER_INPUT.removeprefix("input."): True}
        return compute_fingerprint(config, step, run_dir, inputs | describe_previous(config.dataset.extend_from))
    if step == "cf":
        vectors = _describe_vectors(config.cf) if config.cf.model == "table" else {}
        vectors = keep_old_entries(vectors, _read_fingerprint(run_dir, "cf"))
        return compute_fingerprint(config, step, run_dir, vectors | describe_previous_step(config, "cf"))
    if step in ("stage1", "stage2"):
        spec = config.prompt.stage1 if step == "stage1" else config.prompt.stage2
        backbone = _describe_local_backbone(config.llm.backbone)
        for stage in reversed(STAGES):
            backbone = keep_old_entries(backbone, _read_fingerprint(run_dir, stage))
        inputs = {"prompt": load_prompt_text(spec), **backbone}
        inputs |= describe_previous_step(config, step)
        return compute_fingerprint(config, step, run_dir, inputs)
    return compute_fingerprint(config, "eval", run_dir, describe_previous_step(config, "eval"), skip_missing=True)


def _read_fingerprint(run_dir: RunDir, step: Step) -> dict[str, Any]:
    """Return the recorded fingerprint of a step, empty if the step is not done."""
    return dict(run_dir.read_record(step).get("fingerprint", {})) if run_dir.is_done(step) else {}


def _describe_vectors(cf: CfConfig) -> dict[str, Any]:
    """Return the entries of the user and item vector files."""
    paths = {"user_vectors": cf.user_vectors, "item_vectors": cf.item_vectors}
    files = {name: Path(path) for name, path in paths.items() if path is not None and Path(path).is_file()}
    return {name: describe_file(path) for name, path in files.items()}


def _describe_local_backbone(name: str) -> dict[str, Any]:
    """Return the entries of a local backbone's files; named backbones and hub revisions never change."""
    path = Path(name).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return {f"backbone.{file.name}": describe_file(file) for file in files if file.is_file()}
