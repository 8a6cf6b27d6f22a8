"""What each step depends on today. Cheap: no tensor library, no model, no cluster."""

from __future__ import annotations

from typing import Any

from collm_dist.artifacts import RunDir, Step, compute_fingerprint
from collm_dist.config import Config
from collm_dist.data.id_tables import describe_previous
from collm_dist.data.prompts import load_prompt_text
from collm_dist.data.readers import open_source


def compute_step_fingerprint(config: Config, run_dir: RunDir, step: Step) -> dict[str, Any]:
    """Return a step's fingerprint.

    Args:
        config: the experiment.
        run_dir: where the steps before it are done; evaluation takes what there is.
        step: the step in question.

    Raises:
        ArtifactError: a step before it is not done.
        DataError: the input is missing.
        ConfigError: a prompt file is missing.
    """
    if step == "data":
        inputs = open_source(config.dataset).inputs() | describe_previous(config.dataset.extend_from)
        return compute_fingerprint(config, step, run_dir, inputs)
    if step in ("stage1", "stage2"):
        spec = config.prompt.stage1 if step == "stage1" else config.prompt.stage2
        return compute_fingerprint(config, step, run_dir, {"prompt": load_prompt_text(spec)})
    return compute_fingerprint(config, step, run_dir, skip_missing=step == "eval")
