"""Estimate of a stage's time on a CPU."""

import time

import pytest
import torch

from collm_dist.tuning.cpu_rate import TRAINING_SHARE, estimate_seconds, format_duration, measure_matmul_rate


def test_seconds_are_flops_by_the_share_of_a_matmuls_rate():
    assert estimate_seconds(40 * 0.21e12, 100e9) == pytest.approx(84 / TRAINING_SHARE)
    assert estimate_seconds(2e12, 100e9) == 2 * estimate_seconds(1e12, 100e9) == 4 * estimate_seconds(1e12, 200e9)


def test_the_rate_is_that_of_a_matmul():
    width = 256
    rate = measure_matmul_rate(width)
    left, right = torch.ones(4096, width), torch.ones(width, width)
    left @ right
    started = time.perf_counter()
    left @ right
    seconds = time.perf_counter() - started
    # Other processes may take the core during one of the two.
    assert 0.02 < rate * seconds / (2 * 4096 * width * width) < 50


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 seconds"), (119.6, "120 seconds"), (600, "10.0 minutes"), (9000, "2.5 hours"), (259_200, "3.0 days")],
)
def test_durations_are_easy_to_read(seconds, text):
    assert format_duration(seconds) == text
