"""A model's products with frozen weights, forward and backward, by MKL and by oneDNN in turn (llm/frozen_linear.py).

    python -m benchmarks.frozen_products [--tokens 128 256 ...] [--rounds 8]

The shapes are SmolLM2-135M's; each layer has weights of its own, as in a step, so that they come from memory. Writes
frozen_products_cpu.json: by number of tokens both ways' seconds, and MKL's median over oneDNN's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lib.machine import describe_hardware
from benchmarks.lib.side_process import ROOT
from collm_dist.heap import restart_with_heap
from collm_dist.llm.packed.frozen_linear import multiply
from collm_dist.runs.atomic_files import write_json

LAYERS = 30
# Queries, keys, values, what leads out of attention, the network's three: outputs and inputs.
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))


def time_pass(layers: list[list[Tensor]], tokens: int, side: str) -> float:
    """Return the seconds of a forward and a backward pass through the products alone."""
    inputs = {width: torch.randn(tokens, width) for shape in SHAPES for width in shape}
    product = multiply if side == "onednn" else torch.nn.functional.linear
    started = time.perf_counter()
    for layer in layers:
        for weight in layer:
            product(inputs[weight.shape[1]], weight)
    for layer in reversed(layers):
        for weight in reversed(layer):
            product(inputs[weight.shape[0]], weight.t())
    return time.perf_counter() - started


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256, 512, 679, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers = [[torch.randn(shape) for shape in SHAPES] for _ in range(LAYERS)]
    found = {}
    for tokens in arguments.tokens:
        seconds: dict[str, list[float]] = {"mkl": [], "onednn": []}
        for number in range(arguments.rounds + 1):
            for side, taken in seconds.items():
                took = time_pass(layers, tokens, side)
                if number:  # the first one warms up
                    taken.append(took)
        ratio = statistics.median(seconds["mkl"]) / statistics.median(seconds["onednn"])
        found[tokens] = {"times_as_fast": ratio, "seconds": seconds}
        print(f"{tokens} tokens: oneDNN {ratio:.3f} times as fast", flush=True)
    record = {
        "question": __doc__.splitlines()[0],
        "by_tokens": found,
        "threads": arguments.threads,
        "hardware": describe_hardware(),
        "torch": torch.__version__,
    }
    write_json(arguments.output / "frozen_products_cpu.json", record)


if __name__ == "__main__":
    restart_with_heap()
    main()
