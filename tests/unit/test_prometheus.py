"""Text files for Prometheus, read back by its own parser."""

import logging
import re
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from collm_dist.config.loader import load_config
from collm_dist.errors import ConfigError, WorkerLostError
from collm_dist.monitoring import RunLogger, StateTextfile, TrainingTextfile, check_textfile_dir, tags
from collm_dist.monitoring.prometheus import STATES
from collm_dist.runs.status import RunStatus


def read_samples(path):
    """Return values by gauge name and labels, without the run label."""
    families = text_string_to_metric_families(path.read_text(encoding="utf-8"))
    samples = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = {key: value for key, value in sample.labels.items() if key != "run"}
        assert sample.labels["run"] == "runs/mine"
        samples[sample.name, *labels.values()] = sample.value
    return samples


def test_training_gauges_are_in_base_units(tmp_path):
    textfile = TrainingTextfile(tmp_path, run="runs/mine", step="stage1", total_steps=40)
    textfile.update(10, {tags.TRAIN_LOSS: 0.7, tags.STEP_SECONDS: 1.5, tags.PEAK_MEMORY: 2.0, tags.GRAD_NORM: 3.0})
    textfile.update(20, {tags.TRAIN_LOSS: 0.6, tags.STEP_SECONDS: 1.5, tags.PEAK_MEMORY: 2.5})
    textfile.update(20, {tags.VALID_AUC: 0.61, tags.VALID_UAUC: 0.58, "valid/ndcg@5": 0.2, "valid/ndcg@10": 0.3})
    (path,) = tmp_path.iterdir()
    samples = read_samples(path)
    assert samples["collm_training_loss", "stage1"] == 0.6
    assert samples["collm_training_steps", "stage1"] == 20
    assert samples["collm_training_planned_steps", "stage1"] == 40
    assert samples["collm_training_step_seconds", "stage1"] == 1.5
    assert samples["collm_memory_peak_bytes", "stage1"] == 2.5 * 2**30
    assert samples["collm_valid_auc", "stage1"] == 0.61
    assert samples["collm_valid_ndcg", "5", "stage1"] == 0.2
    assert samples["collm_valid_ndcg", "10", "stage1"] == 0.3
    assert samples["collm_training_grad_norm", "stage1"] == 3.0  # the last reported value
    assert samples["collm_training_updated_timestamp_seconds", "stage1"] == pytest.approx(time.time(), abs=60)


def test_gauges_stay_with_the_last_step_when_the_untrained_model_is_validated_late(tmp_path):
    textfile = TrainingTextfile(tmp_path, run="runs/mine", step="stage2", total_steps=200)
    textfile.update(0, {tags.VALID_AUC: 0.5})
    textfile.update(100, {tags.TRAIN_LOSS: 0.6})
    textfile.update(0, {tags.VALID_AUC: 0.4, tags.VALID_UAUC: 0.4})
    samples = read_samples(next(tmp_path.iterdir()))
    assert samples["collm_training_steps", "stage2"] == 100
    assert samples["collm_valid_auc", "stage2"] == 0.5
    assert ("collm_valid_uauc", "stage2") not in samples


def test_a_resumed_run_keeps_the_gauges_of_its_last_validation(tmp_path):
    def open_log(start_step):
        textfile = TrainingTextfile(tmp_path, run="runs/mine", step="stage2", total_steps=200)
        options = {"is_main": True, "tensorboard": False, "progress_bar": False, "total_steps": 200}
        return RunLogger(tmp_path / "stage2", start_step=start_step, textfile=textfile, **options)

    log = open_log(0)
    log.log(100, {tags.TRAIN_LOSS: 0.6, tags.GRAD_NORM: 2.0})
    log.log(0, {tags.VALID_AUC: 0.4})
    log.log(100, {tags.VALID_AUC: 0.7, "valid/ndcg@5": 0.3})
    log.log(110, {tags.VALID_AUC: 0.9})  # after the last checkpoint
    log.close()
    log = open_log(100)
    log.log(101, {tags.TRAIN_LOSS: 0.55})
    log.close()
    samples = read_samples(next(tmp_path.glob("*-stage2.prom")))
    assert samples["collm_training_steps", "stage2"] == 101
    assert samples["collm_training_loss", "stage2"] == 0.55
    assert samples["collm_training_grad_norm", "stage2"] == 2.0
    assert samples["collm_valid_auc", "stage2"] == 0.7
    assert samples["collm_valid_ndcg", "5", "stage2"] == 0.3


def test_every_run_directory_has_files_of_its_own(tmp_path):
    runs = ["runs/a/b", "runs-a-b", "/runs/a b", "runs_a.b-2", "a"]
    for run in runs:
        TrainingTextfile(tmp_path, run=run, step="cf", total_steps=1).update(1, {tags.TRAIN_LOSS: 1.0})
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == len(runs)
    assert {"runs-a-b-cf.prom", "runs_a.b-2-cf.prom", "a-cf.prom"} < names
    assert {re.sub("-[0-9a-f]{8}-", "-#-", name) for name in names} >= {"runs-a-b-#-cf.prom"}


def test_every_tag_has_a_gauge(tmp_path):
    textfile = TrainingTextfile(tmp_path, run="runs/mine", step="cf", total_steps=1)
    logged = [value for name, value in vars(tags).items() if name.isupper() and isinstance(value, str)]
    textfile.update(1, dict.fromkeys(logged, 1.0))
    assert len(read_samples(next(tmp_path.glob("*-cf.prom")))) == 3 + len(logged)


def test_state_follows_the_status(tmp_path):
    status = RunStatus(tmp_path / "status.json", StateTextfile(tmp_path, run="runs/mine", steps=("data", "cf")))
    assert not list(tmp_path.iterdir())
    status.begin()
    status.enter("cf")
    status.restart(WorkerLostError("a worker died"))
    (path,) = tmp_path.glob("runs-mine-*-state.prom")
    samples = read_samples(path)
    assert [samples["collm_run_state", state] for state in STATES] == [1, 0, 0, 0, 0, 0]
    assert (samples["collm_run_step", "data"], samples["collm_run_step", "cf"]) == (0, 1)
    assert samples["collm_run_restarts",] == 1
    assert ("collm_run_exit_code",) not in samples
    assert samples["collm_run_heartbeat_timestamp_seconds",] == pytest.approx(time.time(), abs=60)
    status.end(decision={"state": "rejected", "reason": "no better"})
    samples = read_samples(path)
    assert [state for state in STATES if samples["collm_run_state", state]] == ["rejected"]
    assert samples["collm_run_exit_code",] == 0
    status.end(WorkerLostError("a worker died"))
    samples = read_samples(path)
    assert [state for state in STATES if samples["collm_run_state", state]] == ["failed"]
    assert samples["collm_run_exit_code",] == WorkerLostError.exit_code


def test_a_run_continues_without_its_gauges(tmp_path, caplog):
    textfile = TrainingTextfile(tmp_path / "missing", run="runs/mine", step="cf", total_steps=1)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            textfile.update(step, {tags.TRAIN_LOSS: 1.0})
    assert len(caplog.records) == 1
    assert "the run continues without" in caplog.text


def test_an_invalid_folder_is_refused(tmp_path, repository):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"prometheus_dir: '.*file' cannot be created .* name a writable"):
        check_textfile_dir(str(tmp_path / "file"))
    check_textfile_dir(str(tmp_path / "new" / "folder"))
    assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(ConfigError, match=r"monitoring.prometheus_dir: 'textfiles' is not an absolute path"):
        load_config(repository / "configs" / "tiny_cpu.yaml", ["monitoring.prometheus_dir=textfiles"])
