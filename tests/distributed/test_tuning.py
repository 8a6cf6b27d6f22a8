"""Both stages with real launchers: two processes, every ZeRO stage, a kill in the middle."""

from __future__ import annotations

import json
import signal
import sys
import time

import numpy as np
import pytest
import safetensors.torch

from collm_dist import monitoring
from tests.distributed.conftest import read_series, run, start

PYTHON = [sys.executable, "launch/train.py"]
DEEPSPEED = ["deepspeed", "--num_gpus", "2", "launch/train.py"]
TORCHRUN = ["torchrun", "--nproc_per_node", "2", "launch/train.py"]
# float32 sums in another order; measured differences are below 1e-6.
TOLERANCE = 1e-5


def assert_same_training(ours, other, stages=("stage1", "stage2"), tolerance=TOLERANCE):
    for stage in stages:
        for tag in (monitoring.TRAIN_LOSS, monitoring.GRAD_NORM, monitoring.VALID_LOGLOSS):
            a, b = read_series(ours, stage, tag), read_series(other, stage, tag)
            assert len(a) == len(b) > 1
            worst = np.max(np.abs(np.array(a) - b) / np.maximum(np.abs(b), 1))
            assert worst <= tolerance, f"{stage} {tag}: {worst:.1e}, tolerance {tolerance}"


def test_two_processes_equal_one_and_products_load(copy_run):
    short = "prompt.max_prompt_tokens=64"
    one, overrides = copy_run("one")
    run(PYTHON, [*overrides, short])
    two, overrides = copy_run("two")
    overrides = [*overrides, short]
    run(DEEPSPEED, overrides)
    assert_same_training(two, one)
    summary = json.loads((two / "stage2" / "summary.json").read_text())
    dropped = json.loads((one / "stage2" / "summary.json").read_text())["dropped_history_items"]
    assert summary["dropped_history_items"] == dropped > 0
    assert summary["global_steps"] == 4
    assert summary["world_size"] == 2
    assert summary["throughput"]["samples_per_second"] > 0
    trained = safetensors.torch.load_file(str(two / "stage2" / "mapping.safetensors"))
    assert all(name.startswith("slot_mapper.") for name in trained)
    again = run(DEEPSPEED, overrides)
    assert again.count("done already") == 2

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    backbone = AutoModelForCausalLM.from_pretrained(overrides[2].partition("=")[2])
    adapter = PeftModel.from_pretrained(backbone, str(two / "stage1" / "adapter"))
    lora = [value for name, value in adapter.named_parameters() if "lora_B" in name]
    assert lora
    assert any(value.abs().sum() > 0 for value in lora)
    config = json.loads((two / "stage1" / "adapter" / "adapter_config.json").read_text())
    assert "/" not in config["base_model_name_or_path"]


@pytest.mark.parametrize(
    "zero_stage",
    [
        pytest.param(0, marks=pytest.mark.slow),
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(3, marks=pytest.mark.slow),
    ],
)
def test_zero_stages_train_alike(copy_run, zero_stage):
    plain, overrides = copy_run("plain")
    run(PYTHON, overrides)
    other, overrides = copy_run(f"zero{zero_stage}")
    output = run(TORCHRUN, [*overrides, f"cluster.zero_stage={zero_stage}"])
    assert "FutureWarning" not in output
    assert_same_training(other, plain)


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(copy_run):
    settings = ["lora.dropout=0.3", "--stage", "1", "stage1.max_steps=12"]
    whole, overrides = copy_run("whole")
    run(PYTHON, [*overrides, *settings])
    killed, overrides = copy_run("killed")
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
def test_run_of_two_processes_resumes_on_one_under_another_zero_stage(copy_run):
    whole, overrides = copy_run("whole")
    run(PYTHON, [*overrides, "--stage", "1"])
    moved, overrides = copy_run("moved")
    process = start(TORCHRUN, [*overrides, "--stage", "1", "cluster.zero_stage=2"], start_new_session=True)
    log = moved / "stage1" / "metrics.jsonl"
    while not log.exists() or '"step": 3' not in log.read_text():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    import os

    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run(PYTHON, [*overrides, "--stage", "1", "cluster.zero_stage=3"])
    assert_same_training(moved, whole, stages=("stage1",))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_context_cache_and_automatic_budget_change_no_result(copy_run, zero_stage):
    """Later validations hit the cache of the first one; the two ranks have different hits."""
    settings = ["--stage", "2", "stage1.enabled=false"]
    plain, overrides = copy_run("plain")
    run(PYTHON, [*overrides, *settings])
    cached, overrides = copy_run("cached")
    run(
        TORCHRUN,
        [*overrides, *settings, f"cluster.zero_stage={zero_stage}", "stage2.context_cache=memory",
         "stage2.context_cache_gib=0.0005", "stage2.max_tokens_per_micro_batch=auto"],
    )  # fmt: skip
    assert_same_training(cached, plain, stages=("stage2",))
