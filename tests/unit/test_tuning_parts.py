"""Parts of tuning that need no process group: learning rate, DeepSpeed config, log."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch

from collm_dist import monitoring
from collm_dist.errors import ConfigError
from collm_dist.tuning.deepspeed_config import OWNED_KEYS, build_deepspeed_config, check_extra
from collm_dist.tuning.learning_rate import compute_learning_rate


def test_learning_rate_warms_up_and_ends_at_its_share():
    rates = [
        compute_learning_rate(step, peak=2.0, warmup_steps=4, total_steps=24, final_share=0.1) for step in range(25)
    ]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[14] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert rates[24] == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[4:]))


def test_deepspeed_config_is_explicit_and_merges_extra_last():
    config = build_deepspeed_config(
        zero_stage=3,
        bfloat16=True,
        max_grad_norm=0.0,
        extra={"zero_optimization": {"overlap_comm": True, "stage": "auto"}, "train_batch_size": "auto"},
    )
    assert config["gradient_clipping"] == 0.0
    assert config["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert config["bf16"] == {"enabled": True}
    assert "train_batch_size" not in config


@pytest.mark.parametrize(
    ("zero_stage", "bfloat16", "expected"), [(0, False, 0), (0, True, 1), (2, True, 2), (3, True, 3)]
)
def test_zero_stage_0_in_bfloat16_becomes_1(zero_stage, bfloat16, expected):
    config = build_deepspeed_config(zero_stage=zero_stage, bfloat16=bfloat16, max_grad_norm=0.0, extra={})
    assert config["zero_optimization"] == {"stage": expected}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"wall_clock_brakdown": True}, "does not know 'wall_clock_brakdown'; did you mean 'wall_clock_breakdown'"),
        ({"zero_optimization": {"overlap_com": True}}, "does not know 'overlap_com'; did you mean 'overlap_comm'"),
        ({"flops_profiler": {"enabled": False, "top_module": 2}}, "'flops_profiler.top_module'; did you mean 'top_mod"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "reduce_bucket_size: Input should be a valid integer"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' is determined by stage1.learning_rate"),
    ],
)
def test_deepspeed_settings_are_refused_before_work(extra, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_extra(extra, 2)


def test_deepspeed_settings_that_it_knows_pass():
    check_extra({}, 0)
    check_extra({"zero_optimization": {"offload_param": {"device": "cpu"}}}, 3)
    check_extra(
        {
            "wall_clock_breakdown": True,
            "steps_per_print": "auto",
            "zero_optimization": {"overlap_comm": True, "offload_optimizer": {"device": "cpu"}, "stage": "auto"},
            "flops_profiler": {"enabled": False, "top_modules": 2},
            "activation_checkpointing": {"partition_activations": False},
            "tensorboard": {"enabled": False, "job_name": "x"},
            "comms_logger": {"enabled": False, "verbose": True},
        },
        2,
    )


@pytest.mark.parametrize("key", OWNED_KEYS)
def test_owned_keys_are_refused(key):
    extra: dict = {}
    target = extra
    *parents, last = key.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
    target[last] = 1
    with pytest.raises(ConfigError, match=f"'{key}' is determined by"):
        build_deepspeed_config(zero_stage=2, bfloat16=False, max_grad_norm=1.0, extra=extra)


def test_logger_removes_points_after_the_resumed_step(tmp_path):
    def log(start_step: int, steps: range) -> None:
        logger = monitoring.RunLogger(
            tmp_path, is_main=True, tensorboard=True, progress_bar=False, start_step=start_step, total_steps=9
        )
        for step in steps:
            logger.log(step, {monitoring.TRAIN_LOSS: float(step)})
        logger.close()

    log(0, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # truncated by a crash
    log(3, range(4, 8))
    assert [line["step"] for line in monitoring.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert list((tmp_path / "tensorboard").iterdir())


def test_logger_writes_the_points_of_the_resumed_step_once(tmp_path):
    for _ in range(2):
        logger = monitoring.RunLogger(
            tmp_path, is_main=True, tensorboard=False, progress_bar=False, start_step=2, total_steps=9
        )
        logger.log(2, {monitoring.VALID_AUC: 0.6})
        logger.close()
    assert len(monitoring.read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_only_rank_0_writes(tmp_path):
    logger = monitoring.RunLogger(
        tmp_path, is_main=False, tensorboard=True, progress_bar=True, start_step=0, total_steps=9
    )
    logger.log(1, {monitoring.TRAIN_LOSS: 1.0})
    logger.advance(1, {})
    logger.close()
    assert not list(tmp_path.iterdir())


def test_peak_memory_is_in_gib():
    assert 0.01 < monitoring.measure_peak_gib(torch.device("cpu")) < 1000
    assert json.dumps(monitoring.measure_peak_gib(torch.device("cpu")))
