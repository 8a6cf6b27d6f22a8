"""A run directory of release 0.1, killed in stage 2: it resumes and reaches the same result."""

import os
import shutil

import pytest

from collm_dist.config.loader import load_config
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.evaluation.report import run_evaluation
from collm_dist.orchestration.preprocess import run_preprocess
from collm_dist.orchestration.pretrain import run_pretrain
from collm_dist.runs.fingerprints import is_step_current
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.checkpoints import load_last_checkpoint
from collm_dist.tuning.run_stage import run_stage
from tests.golden.collect import read_json
from tests.golden.make_run import ASSET, LAST_CHECKPOINT, STEPS_DONE, collect_expected, set_input_times
from tests.golden.records import compare

LATER_RIVALS = {"text_similarity", "blend"}


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """Yield a copy of the run with its original input times; the working directory is the folder around it."""
    shutil.copytree(ASSET, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    set_input_times(tmp_path / "copy")
    before = dict(os.environ)
    yield RunDir(tmp_path / "copy" / "run")
    # A process group of size 1 may stay; its environment variables must not reach child processes.
    for name in set(os.environ) - set(before):
        del os.environ[name]


def test_it_goes_on_and_comes_to_the_same_end(old_run, capsys):
    # Reports of 0.1 were compared with the paper whatever their settings.
    config = load_config(old_run.path / "config.yaml", ["evaluation.recipe=ML-1M"])
    record = read_json(ASSET.with_suffix(".json"))
    for step in STEPS_DONE:
        fingerprint = compute_step_fingerprint(config, old_run, step)
        assert fingerprint == record["found"]["fingerprints"][step], step
        assert is_step_current(old_run, step, fingerprint), step
    run_preprocess(config, old_run, False)
    run_pretrain(config, old_run, False)
    run_stage(config, old_run, "stage1")
    printed = capsys.readouterr().out
    assert all(f"{step}: done already" in printed for step in STEPS_DONE)

    fingerprint = compute_step_fingerprint(config, old_run, "stage2")
    assert fingerprint == record["found"]["fingerprints"]["stage2"]
    assert not old_run.is_done("stage2")
    checkpoints = old_run.step_dir("stage2") / "checkpoints"
    assert load_last_checkpoint(checkpoints, fingerprint).progress.global_step == LAST_CHECKPOINT
    kept = checkpoints / f"step-{LAST_CHECKPOINT:09d}.safetensors"
    untouched = kept.stat().st_mtime_ns
    run_stage(config, old_run, "stage2")
    # A restart from the beginning would have rewritten this file.
    assert kept.stat().st_mtime_ns == untouched
    run_evaluation(config, old_run)
    found = _leave_out_later_rivals(collect_expected(old_run.path))
    for results in (record["found"], found):
        _leave_out_corrections(results)
    compare(record, found, f"{ASSET.name}.json")


def _leave_out_later_rivals(results):
    """Return the results without the models and keys that reports have had since 0.1."""
    report = results["eval"]["report"]
    for name in ("rows", "differences", "calibration"):
        report[name] = [row for row in report[name] if not LATER_RIVALS & {row["model"], row.get("versus")}]
    for name in ("anchor", "proven_loss", "verdicts"):
        del report[name]
    scores = results["eval"]["scores"]
    results["eval"]["scores"] = {name: rows for name, rows in scores.items() if name.split("-")[0] not in LATER_RIVALS}
    return results


def _leave_out_corrections(results):
    """Remove what reports state otherwise since 0.1: bins of many equal scores, training rows before a whole epoch.

    The warning on the size of the split has another text.
    """
    report = results["eval"]["report"]
    assert len(report.pop("warnings")) == 1
    report["calibration"] = [row for row in report["calibration"] if not row["model"].startswith("item")]
    report["rows"] = [row for row in report["rows"] if row["split"] != "train"]
    report["notes"] = [note for note in report["notes"] if "on its training rows" not in note]
    report["data"]["evaluated"].pop("train", None)
    results["eval"]["scores"].pop("stage1-train.parquet", None)


def test_what_it_was_made_from_is_looked_at(old_run):
    """The fingerprints of the steps that are done hold for these inputs alone."""
    config = load_config(old_run.path / "config.yaml")
    before = {step: compute_step_fingerprint(config, old_run, step) for step in STEPS_DONE}
    for path in ("ratings.csv", "backbone/config.json"):
        os.utime(path)
    changed = {step for step in STEPS_DONE if compute_step_fingerprint(config, old_run, step) != before[step]}
    assert changed == {"data", "stage1"}
