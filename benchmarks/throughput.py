"""How much time and memory does a training step take, compared with transformers.Trainer on the same rows?

    python -m benchmarks.throughput --data DIR [--phases stage1 stage2] [--peer-rows 4 8 fastest] [--batches 10]
                                    [--overrides key=value ...]

DIR holds interactions.parquet and items.parquet as configs/ml1m_official.yaml expects them. The peers are those of
benchmarks/lib/tuning_side.py: by default transformers.Trainer with several rows per micro-batch, each a side of its
own; ``fastest`` adds the row count that a trial in a process of its own finds. The batches are a stratified random
sample of an epoch in training order with the epoch's mean number of contexts a batch, which the result states.

Ours and one peer take turns batch by batch, each in a fresh process that does nothing else. ``speedup`` is the peer's
seconds over ours, all batches together, with a bootstrap interval over batches. Memory is the peak resident memory (on
a GPU, allocated memory) above the level at which the weights were loaded, the largest of all batches. ``flop_ratio`` is
the ratio of operations without any padding on our side. Writes throughput_<device>.json after each comparison.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from benchmarks.lib.machine import TUNING_PACKAGES, describe_run, name_device
from benchmarks.lib.padded_model import REFERENCE_ROWS
from benchmarks.lib.tuning_comparison import OURS, Comparison, Side, add_arguments, count_peer, prepare_comparison
from benchmarks.lib.tuning_workload import measure_matmul_rate
from collm_dist.config import Config
from collm_dist.llm.backbone import resolve_dtype
from collm_dist.runs.atomic_files import write_json

PEERS = ("hf_trainer", "reference", "reference_last")
FASTEST = "fastest"
# For the estimate: share of a large matmul's rate that all sides reached on a CPU, and seconds to start a process.
RATE_SHARE, START_SECONDS = 0.6, 30


def parse_rows(text: str) -> int | str:
    """Parse a row count or ``fastest``."""
    return text if text == FASTEST else int(text)


def list_peers(arguments: argparse.Namespace, config: Config) -> list[Side]:
    """Return the peers whose rows per micro-batch are given.

    Raises:
        SystemExit: a row count does not divide the global batch.
    """
    rows = [count for count in arguments.peer_rows if count != FASTEST and "hf_trainer" in arguments.peers]
    sizes = {stage.global_batch_size for stage in (config.stage1, config.stage2)}
    if any(size % count for size in sizes for count in rows):
        sys.exit(f"--peer-rows {rows}: each must divide the global batch size {sizes}")
    trainers = [Side(f"hf_trainer_{count}", "hf_trainer", count) for count in rows]
    return trainers + [Side(kind, kind, REFERENCE_ROWS) for kind in arguments.peers if kind != "hf_trainer"]


def print_estimate(comparison: Comparison, peers: list[Side]) -> None:
    """Print how long the comparisons take, from their operations and a matmul's rate."""
    dtype = resolve_dtype(comparison.config.llm.dtype)
    rate = RATE_SHARE * measure_matmul_rate(torch.device("cuda" if comparison.on_gpu else "cpu"), dtype)
    total = 0.0
    for phase, work in comparison.work.items():
        flops = {"ours": work["flops"]} | {side.name: count_peer(work, side, phase) for side in peers}
        seconds = {name: count / rate / comparison.num_batches for name, count in flops.items()}
        shown = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        print(f"{phase}: a batch of {shown} (estimated)", flush=True)
        for side in peers:
            steps = comparison.num_batches * comparison.rounds + 1
            total += 2 * START_SECONDS + steps * (seconds["ours"] + seconds[side.name])
    print(f"about {total / 60:.0f} minutes in all (estimated from operations, without a trial)", flush=True)


def summarize(phases: dict[str, Any]) -> dict[str, Any]:
    """Return speedup and memory share by phase and peer, and the fastest peer of each phase."""
    summary: dict[str, Any] = {}
    for phase, result in phases.items():
        pairs = result["comparisons"]
        keys = ("speedup", "speedup_95", "memory_share")
        summary[phase] = {name: {key: pair[key] for key in keys} for name, pair in pairs.items()}
        summary[phase]["fastest_peer"] = min(pairs, key=lambda name: pairs[name]["speedup"])
    return summary


def print_pair(phase: str, peer: Side, pair: dict[str, Any]) -> None:
    """Print the numbers of a comparison."""
    low, high = pair["speedup_95"]
    memory = ", ".join(f"{name} {value:.2f} GiB" for name, value in pair["peak_extra_gib"].items())
    print(f"{phase}: {pair['speedup']:.2f} [{low:.2f}, {high:.2f}] times as fast as {peer.name}; {memory}", flush=True)


def main() -> None:
    """Compare ours with each peer, phase after phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--peers", nargs="+", default=["hf_trainer"], choices=PEERS)
    rows = [FASTEST] if torch.cuda.is_available() else [4, 8]
    parser.add_argument("--peer-rows", nargs="+", type=parse_rows, default=rows, help="of a micro-batch of hf_trainer")
    arguments = parser.parse_args()
    path = arguments.output / f"throughput_{name_device()}{arguments.suffix}.json"
    with prepare_comparison(arguments) as comparison:
        given = list_peers(arguments, comparison.config)
        print_estimate(comparison, given)
        phases: dict[str, Any] = {}
        for phase, work in comparison.work.items():
            facts = {name: value for name, value in work.items() if name not in ("lengths", "shape")}
            result = phases[phase] = {**facts, "comparisons": {}}
            peers = list(given)
            if FASTEST in arguments.peer_rows and "hf_trainer" in arguments.peers:
                fastest, result["trial_seconds_by_rows"] = comparison.find_fastest_rows(phase)
                if fastest not in arguments.peer_rows:
                    peers.append(Side(f"hf_trainer_{fastest}", "hf_trainer", fastest))
            for peer in peers:
                pair = comparison.measure_pair(phase, OURS, peer)
                pair["flop_ratio"] = count_peer(work, peer, phase) / work["flops"]
                result["comparisons"][peer.name] = pair
                print_pair(phase, peer, pair)
                record = {"question": __doc__.splitlines()[0], "summary": summarize(phases)}
                record |= {"config": comparison.describe(), "phases": phases}
                write_json(path, record | describe_run(*TUNING_PACKAGES))


if __name__ == "__main__":
    main()
