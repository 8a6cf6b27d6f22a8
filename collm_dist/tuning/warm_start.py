"""What tuning takes over from the run that this one extends: stage 1 as it is, or the mapping to begin with."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ArtifactError
from collm_dist.llm.slot_mapping import SlotMapper
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.fingerprints import find_changes
from collm_dist.runs.previous_run import find_previous, find_previous_file
from collm_dist.runs.run_dir import RunDir

logger = logging.getLogger(__name__)

DAY_SECONDS = 86_400
# What differs between two nights though nothing about stage 1's training does.
_OF_A_NIGHT = frozenset({"upstream.data", "config.stage1.refresh_every_days"})
_PRODUCTS = ("adapter", "merged")


def explain_refresh(config: Config, run_dir: RunDir, fingerprint: Mapping[str, Any]) -> str | None:
    """Return why stage 1 is to be trained today, None if the earlier run's is to be taken.

    Args:
        config, run_dir: of today; the data step is done.
        fingerprint: of today's stage 1.

    Raises:
        ArtifactError: a record is damaged.
    """
    days, previous = config.stage1.refresh_every_days, find_previous(config)
    if days is None or previous is None:
        return "stage1.refresh_every_days or dataset.extend_from is not set"
    if not previous.is_done("stage1"):
        return f"{previous.path} has no stage 1"
    record = previous.read_record("stage1")
    then, now = ({key: value for key, value in one.items() if key not in _OF_A_NIGHT}
                 for one in (record["fingerprint"], fingerprint))  # fmt: skip
    if changes := find_changes(then, now):
        return f"{previous.path} trained it otherwise: {'; '.join(changes)}"
    newest = load_manifest(run_dir.step_dir("data")).splits["train"].last_timestamp
    age = (newest - record["trained_until"]) / DAY_SECONDS
    if age >= days:
        return f"the training data reach {age:.1f} days beyond those of {previous.path}"
    return None


def take_stage1(config: Config, run_dir: RunDir, fingerprint: Mapping[str, Any]) -> None:
    """Let today's stage 1 be the earlier run's: links to its files, and a record that says so, written last."""
    previous = find_previous(config)
    assert previous is not None
    folder, origin = run_dir.step_dir("stage1"), previous.step_dir("stage1").resolve()
    run_dir.withdraw("stage1")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in _PRODUCTS:
        source = (origin / name).resolve()
        (folder / name).symlink_to(os.path.relpath(source, folder.resolve()), target_is_directory=True)
    record = previous.read_record("stage1") | {"fingerprint": dict(fingerprint)}
    record["taken_from"] = record.get("taken_from") or str(origin.parent)
    write_json(run_dir.record_path("stage1"), record)


def start_mapping(config: Config, mapper: SlotMapper) -> None:
    """Let stage 2's mapping begin where the earlier run's ended, if it has the same slots and sizes.

    Raises:
        ArtifactError: that run's file is damaged.
    """
    path = find_previous_file(config, "stage2")
    if path is None:
        return
    try:
        weights = safetensors.torch.load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be loaded ({error}); redo its stage 2 with --force stage2") from error
    prefix = "slot_mapper."
    own = {key.removeprefix(prefix): one for key, one in weights.items() if key.startswith(prefix)}
    wanted = {key: one.shape for key, one in mapper.state_dict().items()}
    if wanted == {key: one.shape for key, one in own.items()}:
        mapper.load_state_dict(own)
        logger.info("stage2: the mapping begins with the weights of %s", path)
    else:
        logger.warning("stage2: %s has other slots or sizes; the mapping begins from nothing", path)


def load_previous_config(previous: RunDir) -> Config:
    """Return the earlier run's settings, with the prompt that its stage 2 was trained on, whatever its file says today.

    Raises:
        ConfigError: they are no settings of this version.
        ArtifactError: its stage 2 is not done.
    """
    config = load_config(previous.path / "config.yaml")
    text = previous.read_record("stage2")["fingerprint"]["input.prompt"]
    return config.model_copy(update={"prompt": config.prompt.model_copy(update={"stage2": text})})


def build_view(folder: Path, run_dir: RunDir, previous: RunDir) -> RunDir:
    """Return a run directory of links in which the earlier run's models meet today's data.

    Args:
        folder: empty.
        run_dir: of today.
        previous: the earlier run.
    """
    (run_dir.path / "item_tokens").mkdir(exist_ok=True)
    origins = {name: run_dir.path / name for name in ("data", "item_tokens")}
    origins |= {name: previous.path / name for name in ("cf", "stage1", "stage2")}
    for name, origin in origins.items():
        if origin.exists():
            (folder / name).symlink_to(origin.resolve(), target_is_directory=True)
    return RunDir(folder)
