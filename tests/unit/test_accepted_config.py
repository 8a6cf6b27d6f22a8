"""``config.yaml`` of a run: written with accepted settings only, by every command of a step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from collm_dist.commands import evaluate_model, search
from collm_dist.config import Config
from collm_dist.config.loader import change_settings, dump_config
from collm_dist.data.accepted_config import CONFIG_FILE, accept_config
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import ArtifactError, CheckpointError
from collm_dist.orchestration.cf_search import run_search
from collm_dist.orchestration.stage_search import run_stage_search
from collm_dist.runs.fingerprints import compute_fingerprint
from collm_dist.runs.run_dir import STEPS, RunDir
from collm_dist.tuning.checkpoints import Checkpoint, save_checkpoint
from collm_dist.tuning.engine import TrainingState

PROMPT = "Like <TargetItemTitle>? Answer:"


def configure(folder, **dataset) -> Config:
    """Return a config whose log is not on this machine, so that of the data step only settings are compared."""
    return Config.model_validate(
        {"run": {"dir": str(folder)}, "dataset": {"path": "absent.csv", "columns": {"rating": "r"}, **dataset},
         "prompt": {"stage1": PROMPT, "stage2": PROMPT}, "llm": {"backbone": "named/elsewhere"},
         "promotion": {"min_paired_difference": 0}}
    )  # fmt: skip


def finish(config: Config) -> RunDir:
    """Write the record of each step, and ``config.yaml``."""
    run_dir = RunDir(Path(config.run.dir))
    for step in STEPS:
        fingerprint = (
            compute_fingerprint(config, step, run_dir)
            if step == "data"
            else compute_step_fingerprint(config, run_dir, step)
        )
        run_dir.write_record(step, {"fingerprint": fingerprint, "content_hash": f"{run_dir.path}: {step}"})
    (run_dir.path / CONFIG_FILE).write_text(dump_config(config))
    return run_dir


def test_a_checkpoint_of_other_settings_keeps_the_config(tmp_path):
    config = configure(tmp_path / "run")
    changed = change_settings(config, {"stage1.learning_rate": 5e-3})
    run_dir, other = finish(config), finish(change_settings(changed, {"run.dir": str(tmp_path / "other")}))
    fingerprint = compute_step_fingerprint(changed, run_dir, "stage1")
    other.write_record("stage1", {"fingerprint": fingerprint, "content_hash": "stage 1", "files": {}})
    for step in ("stage1", "stage2", "eval"):
        run_dir.withdraw(step)
    folder = run_dir.step_dir("stage1") / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint = Checkpoint(TrainingState({"lora": torch.ones(2)}, {}, 1))
    path = save_checkpoint(folder, checkpoint, compute_step_fingerprint(config, run_dir, "stage1"))

    own = ("stage1", "stage2")
    accept_config(config, run_dir, own=own)
    with pytest.raises(CheckpointError, match=rf"{path.name} was made .*\n.*stage1\.learning_rate: .* -> 0\.005\n"):
        accept_config(changed, run_dir, own=own)
    assert (run_dir.path / CONFIG_FILE).read_text() == dump_config(config)

    for accepted, force in (
        (changed, ("stage1",)),
        (change_settings(changed, {"run.reuse": [str(other.path)]}), ()),  # the stage is done there
    ):
        accept_config(accepted, run_dir, force, own=own)
        assert (run_dir.path / CONFIG_FILE).read_text() == dump_config(accepted)
    path.write_bytes(path.read_bytes()[:100])  # the stage falls back to the checkpoint before it
    accept_config(changed, run_dir, own=own)


@pytest.mark.parametrize("own", [("eval",), ("stage1", "stage2"), ("cf",)])
@pytest.mark.parametrize("missing", [None, "stage2"])
def test_a_report_with_other_settings_keeps_the_config(tmp_path, own, missing):
    config = configure(tmp_path / "run")
    run_dir = finish(config)
    if missing is not None:
        run_dir.withdraw(missing)
    accept_config(config, run_dir, own=own)
    changed = change_settings(config, {"evaluation.confidence": 0.9})
    with pytest.raises(ArtifactError, match=r"config\.evaluation\.confidence: 0\.95 -> 0\.9\n.*--force eval\)"):
        accept_config(changed, run_dir, own=own)
    assert (run_dir.path / CONFIG_FILE).read_text() == dump_config(config)
    accept_config(changed, run_dir, force=["eval"], own=("eval",))
    assert (run_dir.path / CONFIG_FILE).read_text() == dump_config(changed)


def test_a_report_of_fewer_steps_is_made_again(tmp_path):
    config = configure(tmp_path / "run")
    run_dir = finish(config)
    record = run_dir.read_record("eval")
    del record["fingerprint"]["upstream.stage2"]
    run_dir.write_record("eval", record)
    accept_config(config, run_dir, own=("eval",))


def test_a_setting_that_was_not_set_is_compared_by_commands_of_other_steps(tmp_path):
    config = configure(tmp_path / "run")
    run_dir = finish(config)
    with_texts = change_settings(config, {"cf.item_text": 16})
    with pytest.raises(ArtifactError, match=r"config\.cf\.item_text: \(absent\) -> 16\n.*collm-dist run --force cf;"):
        accept_config(with_texts, run_dir, own=("eval",))
    finish(with_texts)
    with pytest.raises(ArtifactError, match=r"config\.cf\.item_text: 16 -> \(absent\)"):
        accept_config(config, run_dir, own=("eval",))


@pytest.fixture
def night(tmp_path, monkeypatch, capsys):
    """A finished run that extends another and is in use by now; calls a command with the config of the night."""
    finish(configure(tmp_path / "one"))
    finish(configure(tmp_path / "two", extend_from=str(tmp_path / "one")))
    (tmp_path / "current").symlink_to("two")
    (tmp_path / "night.yaml").write_text(
        dump_config(configure(tmp_path / "two", extend_from=str(tmp_path / "current")))
    )

    def call(command, *arguments):
        monkeypatch.setattr(sys, "argv", ["prog", "--config", str(tmp_path / "night.yaml"), *arguments])
        return command.main(), "".join(capsys.readouterr())

    return call


def test_the_report_of_a_night_is_made_with_its_config_after_its_promotion(night, tmp_path):
    code, shown = night(evaluate_model)
    assert (code, "eval: up to date" in shown) == (0, True), shown
    assert f"extend_from: {tmp_path / 'one'}" in (tmp_path / "two" / CONFIG_FILE).read_text()


def test_a_search_extends_what_its_run_extends(night, tmp_path):
    (tmp_path / "two" / CONFIG_FILE).unlink()
    code, shown = night(search, "--step", "cf")
    assert (code, "leads to this very run" in shown) == (2, True), shown


@pytest.mark.parametrize(
    "start", [run_search, lambda config, run_dir: run_stage_search(config, run_dir, "stage1")], ids=["cf", "stage1"]
)
def test_a_search_with_other_settings_of_an_earlier_step_is_refused(tmp_path, start):
    config = configure(tmp_path / "run")
    run_dir = finish(config)
    changed = change_settings(config, {"dataset.like_threshold": 3.5})
    with pytest.raises(ArtifactError, match=r"config\.dataset\.like_threshold: .* -> 3\.5\n.*run --force data;"):
        start(changed, run_dir)
    assert not list(run_dir.path.glob("*_search"))
