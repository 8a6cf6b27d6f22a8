"""What the benchmark of attention compares gives the same results."""

from __future__ import annotations

import argparse

import torch

from benchmarks.attention_kernels import compare

# float32; measured: up to 5e-7.
TOLERANCE = 5e-6


def test_blocks_of_any_size_and_flex_attention_agree():
    shape = {"heads": 4, "key_heads": 2, "width": 16, "dtype": "float32", "seed": 0}
    arguments = argparse.Namespace(**shape, rows=9, repeats=1, eager_flex=True)
    found = compare(arguments, torch.device("cpu"))
    assert found["blocks"]["one_block"] == 1
    assert found["blocks"]["blocks_0"] > 5
    assert "flex" in found["largest_difference"]
    assert max(found["largest_difference"].values()) < TOLERANCE
