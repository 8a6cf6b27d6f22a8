"""Stage 2 of the previous run (``dataset.extend_from``), set up to score today's rows."""

from __future__ import annotations

from pathlib import Path

from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.runs.code_trust import check_code
from collm_dist.runs.run_dir import RunDir


def load_previous_config(previous: RunDir) -> Config:
    """Return the previous run's config, with the prompt that its stage 2 was trained on.

    Raises:
        ConfigError: its config file does not fit this version.
        ArtifactError: its stage 2 is not done, or it names code and was not trained by this account.
    """
    config = load_config(previous.path / "config.yaml")
    check_code(config, previous)
    text = previous.read_record("stage2")["fingerprint"]["input.prompt"]
    return config.model_copy(update={"prompt": config.prompt.model_copy(update={"stage2": text})})


def link_previous_models(folder: Path, run_dir: RunDir, previous: RunDir) -> RunDir:
    """Return a run directory of links: the previous run's models, today's data.

    Args:
        folder: empty.
        run_dir: today's run.
        previous: the previous run.
    """
    (run_dir.path / "item_tokens").mkdir(exist_ok=True)
    origins = {name: run_dir.path / name for name in ("data", "item_tokens")}
    origins |= {name: previous.path / name for name in ("cf", "stage1", "stage2")}
    for name, origin in origins.items():
        if origin.exists():
            (folder / name).symlink_to(origin.resolve(), target_is_directory=True)
    return RunDir(folder)
