"""Loading of a finished run: the stage that scores, its verified settings, its recommender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.config.yaml_file import BASE_KEY, read_yaml
from collm_dist.errors import ArtifactError
from collm_dist.llm.packed.kept_contexts import KeptContexts
from collm_dist.runs.code_trust import check_code
from collm_dist.runs.damage import explain_read_errors
from collm_dist.runs.fingerprints import compute_fingerprint, find_changes
from collm_dist.runs.run_dir import STAGES, RunDir, StageName
from collm_dist.serving.fresh_events import EventSource
from collm_dist.serving.recommender import Recommender
from collm_dist.tuning.stage import load_stage_model


def load_recommender(
    run_dir: Path | str,
    device: torch.device | str | None = None,
    *,
    trust_code: bool = False,
    accept_stage1: bool = False,
    events: EventSource | None = None,
    reuse_bytes: int = 0,
) -> Recommender:
    """Load a finished run.

    Args:
        run_dir: the run's directory, ``run.dir``.
        device: device of the model; None = the first GPU, or the CPU without GPUs.
        trust_code: run code that the run names (``llm.trust_remote_code``, a ``cf.model`` of its own). Runs that were
            trained by this account need no permission.
        accept_stage1: rank with stage 1 if stage 2 is not done.
        events: an ``EventStore``, whose events count as if they were in the run's log, unless the run has read them.
        reuse_bytes: memory, on the device, for what the model has computed of the users' contexts; a user who returns
            is then ranked faster. 0 = nothing is kept.

    Raises:
        ArtifactError: stage 2 is not done, or neither stage is; an artifact is missing, damaged or made from other
            inputs, or the run names code that is not trusted.
        ConfigError: the run's settings are not valid in this version.
    """
    run = RunDir(Path(run_dir))
    find_stage(run)
    if not (run.path / "config.yaml").exists():
        raise ArtifactError(
            f"{run.path / 'config.yaml'} is missing; launch/run_pipeline.py writes it and skips steps that are done"
        )
    with explain_read_errors(run.path):
        config = load_run_config(run.path / "config.yaml")
        config = check_settings(config, run, trust_code=trust_code, accept_stage1=accept_stage1)
        return build_recommender(config, run, device, events, reuse_bytes)


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Load the settings of a finished run or an export, which may come from someone else.

    Raises:
        ArtifactError: they build on another file, which no run's own settings do.
        ConfigError: they are not valid in this version.
    """
    if BASE_KEY in read_yaml(path):
        raise ArtifactError(
            f"{path}: {BASE_KEY}: a run's settings are complete; remove this line if you trust the rest"
        )
    return load_config(path, overrides)


def build_recommender(
    config: Config,
    run_dir: RunDir,
    device: torch.device | str | None = None,
    events: EventSource | None = None,
    reuse_bytes: int = 0,
    now: int | None = None,
) -> Recommender:
    """Build the recommender of settings that ``check_settings`` has returned; see ``load_recommender``.

    Items are available or not at ``now``, in seconds since 1970; None = at the time of each request.
    """
    stage = find_stage(run_dir)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_stage_model(config, run_dir, stage, torch.device(device))
    if reuse_bytes:
        loaded.model.kept_contexts = KeptContexts(reuse_bytes, run_dir.read_content_hash(stage))
    return Recommender(config, run_dir, stage, loaded, events, now)


def find_stage(run_dir: RunDir) -> StageName:
    """Return the stage whose model scores: stage2 if it is done, else stage1.

    Raises:
        ArtifactError: neither is done, or stage 2 has a product without a record.
    """
    for stage in reversed(STAGES):
        if run_dir.is_done(stage):
            return stage
        product = run_dir.step_dir(stage) / "mapping.safetensors"
        if product.exists():  # stage 1 would score in its place, without a word
            raise ArtifactError(
                f"{run_dir.record_path(stage)} is missing although {product.name} is there: restore it from a copy, or "
                f"finish the stage with launch/run_pipeline.py, or remove {product.name} to rank with stage 1"
            )
    raise ArtifactError(f"{run_dir.path}: neither stage 2 nor stage 1 is done; run launch/run_pipeline.py first")


def check_settings(config: Config, run_dir: RunDir, *, trust_code: bool = False, accept_stage1: bool = False) -> Config:
    """Return the settings with the prompt that the model was trained on, even if the prompt's file has changed since.

    Raises:
        ArtifactError: stage 2 is not done, and ``accept_stage1`` is not set; the model was made with other settings, or
            from other data or models than the run holds now; or the run names code, was not trained by this account,
            and ``trust_code`` is not set.
    """
    stage = find_stage(run_dir)
    if stage == "stage1" and not accept_stage1:
        raise ArtifactError(
            f"{run_dir.path}: stage 2 is not done, so stage 1 would rank, without collaborative information; finish "
            f"the run with launch/run_pipeline.py, or accept stage 1: --accept-stage-1, or accept_stage1=True in Python"
        )
    if not trust_code:
        check_code(config, run_dir)
    recorded = run_dir.read_record(stage).get("fingerprint", {})
    today = compute_fingerprint(config, stage, run_dir)
    if getattr(config.prompt, stage) == recorded.get("input.prompt"):  # an export has the text of a prompt file
        del today[f"config.prompt.{stage}"]
    changes = find_changes({key: recorded[key] for key in today if key in recorded}, today)
    if changes:
        raise ArtifactError(
            f"{stage} in {run_dir.path} was made from other settings or inputs than the present ones:\n  "
            + "\n  ".join(changes)
            + f"\nUse the settings that it was made with, or rebuild it: launch/run_pipeline.py --force {stage}"
        )
    if not isinstance(recorded.get("input.prompt"), str):
        path = run_dir.record_path(stage)
        raise ArtifactError(
            f"{path} is damaged (it has no prompt): restore it from a copy, or redo it with --force {stage}"
        )
    prompt = config.prompt.model_copy(update={stage: recorded["input.prompt"]})
    return config.model_copy(update={"prompt": prompt})
