"""A finished run that needs no cluster to make."""

import os
import shutil
from pathlib import Path

import pytest

from collm_dist.config.loader import change_settings, dump_config, load_config
from collm_dist.runs.atomic_files import compute_file_hash
from collm_dist.runs.run_dir import STAGES, RunDir
from collm_dist.tuning.run_stage import run_stage
from tests.golden.make_run import ASSET, set_input_times


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run whose data, CF step and stages are finished: release 0.1 began it, this one finished it."""
    folder = shutil.copytree(ASSET, tmp_path_factory.mktemp("begun") / "copy")
    before, old = dict(os.environ), Path.cwd()
    os.chdir(folder)
    set_input_times(folder)
    run = RunDir(folder / "run")
    try:
        config = load_config(run.path / "config.yaml")
        run_stage(config, run, "stage1", force=True)
        run_stage(config, run, "stage2", force=True)
    finally:
        os.chdir(old)
        for name in set(os.environ) - set(before):
            del os.environ[name]
    record = run.read_record("cf")
    run.write_record(
        "cf", record | {"files": {"model.safetensors": compute_file_hash(run.step_dir("cf") / "model.safetensors")}}
    )
    return folder


def relocate(finished, folder, changes):
    """Copy a finished run to ``folder``, with absolute paths of it in settings and records.

    Args:
        finished: folder with ``run`` and ``backbone``.
        folder: new folder.
        changes: further settings.
    """
    shutil.copytree(finished, folder)
    run, backbone = RunDir(folder / "run"), str(folder / "backbone")
    config = load_config(run.path / "config.yaml")
    paths = {"llm.backbone": backbone, "run.dir": str(run.path), "dataset.path": str(folder / "ratings.csv")}
    (run.path / "config.yaml").write_text(dump_config(change_settings(config, paths | changes)))
    for stage in STAGES:
        record = run.read_record(stage)
        record["fingerprint"]["config.llm.backbone"] = backbone
        run.write_record(stage, record)
    return run
