"""A pipeline's run directory, made in this process: saves the seconds that commands need to load their libraries."""

import os
from pathlib import Path

from collm_dist.config import Config
from collm_dist.config.loader import dump_config, load_config
from collm_dist.evaluation.report import run_evaluation
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.preprocess import run_preprocess
from collm_dist.orchestration.pretrain import run_pretrain
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.run_stage import run_stage


def begin_run(config_path: Path, overrides: list[str]) -> tuple[Config, RunDir]:
    """Go through the steps on Ray, data and cf, and return the experiment and its run directory."""
    config = load_config(config_path, overrides)
    run_dir = RunDir(Path(config.run.dir))
    run_dir.path.mkdir()
    (run_dir.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    with connect_ray(config.cluster):
        run_preprocess(config, run_dir, False)
        run_pretrain(config, run_dir, False)
    return config, run_dir


def build_run(config_path: Path, overrides: list[str]) -> Path:
    """Go through all steps of an experiment and return its run directory."""
    before = dict(os.environ)
    config, run_dir = begin_run(config_path, overrides)
    run_stage(config, run_dir, "stage1")
    run_stage(config, run_dir, "stage2")
    run_evaluation(config, run_dir)
    # A process group of one may stay; what says so to child processes may not.
    for name in set(os.environ) - set(before):
        del os.environ[name]
    return run_dir.path
