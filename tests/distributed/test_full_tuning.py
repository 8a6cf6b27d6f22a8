"""Stage 1 with all weights of the layers (``lora.rank: full``): sharded, killed, and its products."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import safetensors.torch

from collm_dist import RankingRequest, load_recommender
from collm_dist.config.loader import load_config
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.licences import Licences
from tests.distributed.conftest import run, start, wait_for_step
from tests.distributed.test_tuning import PYTHON, TOLERANCE, TORCHRUN, assert_same_training

FULL = ["lora.rank=full", "stage1.learning_rate=1e-3"]
WEIGHTS = "stage1/merged/model.safetensors"
REQUESTS = [RankingRequest(None, ["3", "17"], [str(number) for number in range(1, 41)])]


@pytest.mark.parametrize("zero_stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_two_processes_equal_one_and_the_layers_alone_have_changed(copy_run, tmp_path, zero_stage):
    one, overrides = copy_run("one")
    run(PYTHON, [*overrides, *FULL])
    two, overrides = copy_run("two")
    run(TORCHRUN, [*overrides, *FULL, f"cluster.zero_stage={zero_stage}"])
    assert_same_training(two, one)
    backbone = overrides[2].partition("=")[2]
    paths = (f"{backbone}/model.safetensors", two / WEIGHTS, one / WEIGHTS)
    published, tuned, alone = (safetensors.torch.load_file(str(path)) for path in paths)
    assert published.keys() == tuned.keys()
    for name, value in published.items():
        assert value.equal(tuned[name]) != (".layers." in name), name
        np.testing.assert_allclose(tuned[name], alone[name], atol=TOLERANCE, rtol=0)  # measured: 3e-7
    assert not (two / "stage1" / "adapter").exists()
    trained = json.loads((two / "stage1" / "summary.json").read_text())["trainable_parameters"]
    assert trained == sum(value.numel() for name, value in tuned.items() if ".layers." in name)

    config = load_config("configs/tiny_cpu.yaml", [*overrides, *FULL])
    export_model(config, RunDir(two), tmp_path / "export", Licences("MIT", "MIT", "MIT"))
    card = (tmp_path / "export" / "README.md").read_text()
    assert "all layers tuned" in card
    assert "library_name: transformers" in card
    assert "peft" not in card
    imported = import_model(tmp_path / "export", RunDir(tmp_path / "imported"))
    here, there = (load_recommender(path, device="cpu").score(REQUESTS) for path in (two, imported.path))
    np.testing.assert_array_equal(here, there)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(copy_run):
    settings = [*FULL, "--stage", "1", "stage1.max_steps=12"]
    whole, overrides = copy_run("whole")
    run(PYTHON, [*overrides, *settings])
    killed, overrides = copy_run("killed")
    process = start(PYTHON, [*overrides, *settings])
    wait_for_step(process, killed, "stage1", 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run(PYTHON, [*overrides, *settings])
    assert_same_training(killed, whole, stages=("stage1",), tolerance=0.0)
    assert (killed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
