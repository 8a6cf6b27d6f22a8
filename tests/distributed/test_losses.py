"""Losses that compare targets, with real launchers: processes, token limits and a kill change nothing."""

from __future__ import annotations

import json
import signal
import sys
import time

import numpy as np
import pytest

from collm_dist import monitoring
from collm_dist.config.loader import load_config
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.preprocess import run_preprocess
from collm_dist.orchestration.pretrain import run_pretrain
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.losses import LOSS_TAGS
from collm_dist.tuning.run_stage import build_orders
from collm_dist.tuning.validation import load_valid_rows
from tests.distributed.conftest import REPOSITORY, read_series, run, start

PYTHON = [sys.executable, "launch/train.py"]
DEEPSPEED = ["deepspeed", "--num_gpus", "2", "launch/train.py"]
# float32 sums in another order; measured differences are below 1e-6.
TOLERANCE = 1e-5
TAGS = (*LOSS_TAGS, monitoring.GRAD_NORM, monitoring.VALID_LOGLOSS)
WEIGHTS = [f"stage{stage}.{term}_weight=0.5" for stage in (1, 2) for term in ("pairwise", "listwise")]


@pytest.fixture(scope="session")
def clicks(tmp_path_factory, tiny_ratings, tiny_backbone_dir):
    """Return the settings of an experiment on clicks without its run directory, and a folder with data and CF steps."""
    folder = tmp_path_factory.mktemp("clicks") / "run"
    overrides = [
        f"dataset.path={tiny_ratings / 'ratings.csv'}",
        f"dataset.items_path={tiny_ratings / 'items.csv'}",
        "dataset.feedback=implicit",
        "dataset.columns.rating=null",
        f"llm.backbone={tiny_backbone_dir}",
    ]
    config = load_config(REPOSITORY / "configs" / "tiny_cpu.yaml", [*overrides, f"run.dir={folder}"])
    with connect_ray(config.cluster):
        run_preprocess(config, RunDir(folder))
        run_pretrain(config, RunDir(folder))
    return folder, overrides


@pytest.fixture
def copy_clicks(clicks, tmp_path):
    """Return a function that copies the run and returns its folder and overrides."""
    import shutil

    def copy(name):
        folder, overrides = clicks
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name, [*overrides, f"run.dir={tmp_path / name}"]

    return copy


def assert_same_training(ours, other, stages=("stage1", "stage2"), tolerance=TOLERANCE):
    for stage in stages:
        for tag in TAGS:
            a, b = read_series(ours, stage, tag), read_series(other, stage, tag)
            assert len(a) == len(b) > 1, tag
            worst = np.max(np.abs(np.array(a) - b) / np.maximum(np.abs(b), 1))
            assert worst <= tolerance, f"{stage} {tag}: {worst:.1e}, tolerance {tolerance}"


@pytest.mark.slow
def test_two_processes_with_a_smaller_limit_equal_one_process(copy_clicks):
    one, overrides = copy_clicks("one")
    run(PYTHON, [*overrides, *WEIGHTS])
    for stage in ("stage1", "stage2"):
        total, bce, pairwise, listwise = (np.array(read_series(one, stage, tag)) for tag in LOSS_TAGS)
        assert (pairwise > 0).all()
        assert (listwise > 0).all()
        assert total == pytest.approx(bce + 0.5 * pairwise + 0.5 * listwise, rel=1e-6)
    two, overrides = copy_clicks("two")
    limits = [f"stage{stage}.max_tokens_per_micro_batch=600" for stage in (1, 2)]
    run(DEEPSPEED, [*overrides, *WEIGHTS, *limits])
    assert_same_training(two, one)


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(copy_clicks):
    settings = [*WEIGHTS, "lora.dropout=0.3", "--stage", "1", "stage1.max_steps=12"]
    whole, overrides = copy_clicks("whole")
    run(PYTHON, [*overrides, *settings])
    killed, overrides = copy_clicks("killed")
    process = start(PYTHON, [*overrides, *settings])
    log = killed / "stage1" / "metrics.jsonl"
    while not log.exists() or '"step": 5' not in log.read_text():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run(PYTHON, [*overrides, *settings])
    assert_same_training(killed, whole, stages=("stage1",), tolerance=0.0)
    name = "stage1/adapter/adapter_model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_stage_selects_by_the_ranking_of_whole_candidate_lists(copy_clicks):
    folder, overrides = copy_clicks("ranked")
    settings = ["--stage", "1", "stage1.select_metric=ndcg@3", "stage1.eval_every_steps=1"]
    run(DEEPSPEED, [*overrides, *settings])
    values = read_series(folder, "stage1", f"{monitoring.VALID_NDCG}@3")
    best = json.loads((folder / "stage1" / "summary.json").read_text())["best_valid"]
    assert len(set(values)) > 1
    assert best["ndcg@3"] == max(values)
    assert best["step"] == 1 + values.index(max(values))

    config = load_config(REPOSITORY / "configs" / "tiny_cpu.yaml", overrides)
    settings = config.stage1.model_copy(update={"max_valid_contexts": 7})
    sizes = {}
    for name, stage in (("sampled", settings), ("all", settings.model_copy(update={"max_valid_contexts": None}))):
        rows = load_valid_rows(build_orders(config, RunDir(folder), stage)[1])
        sizes[name] = dict(zip(*np.unique(rows.group_id, return_counts=True), strict=True))
    assert 0 < len(sizes["sampled"]) < len(sizes["all"])
    assert sizes["sampled"].items() <= sizes["all"].items()
    assert set(sizes["all"].values()) == {config.evaluation.num_candidates}
