"""How fast are training, validation and scoring, beside what people use today? One run, the sides in turn.

    python -m benchmarks.throughput --data DIR [--phases stage1 stage2 ...] [--batches 4] [--overrides key=value ...]

DIR holds interactions.parquet and items.parquet as configs/ml1m_official.yaml wants them. The peers are those of
benchmarks/lib/tuning_side.py: transformers.Trainer, and the authors' recipe with logits at all positions or at the last
one. Ours and a peer work in turn through the same global batches of an epoch in training order, taken so that they
stand for its mix of contexts; ratios are the peer's seconds over ours, of all batches together. ``flop_ceiling`` is the
same ratio of operations, with no padding on our side: the most that can be had. Each side runs in a process of its own.
Writes throughput_<device>.json and .png; phases that are not run keep what is there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.lib.machine import name_device
from benchmarks.lib.tuning_comparison import PEERS, add_arguments, count_peer, prepare_comparison
from benchmarks.lib.tuning_workload import measure_matrix_ceiling
from collm_dist.llm.backbone import resolve_dtype
from collm_dist.runs.atomic_files import write_json


def summarize(phase: str, work: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Add ratios and rates to a phase's samples."""
    flops, seconds, by_batch = dict(work["flops"]), {}, {}
    for peer, samples in result["samples"].items():
        flops[peer] = count_peer(work, peer, phase, result["ready"][peer]["rows_per_micro_batch"])
        took = {side: [one["seconds"] for one in found] for side, found in samples.items()}
        seconds[peer] = {side: sum(values) for side, values in took.items()}
        by_batch[peer] = [theirs / ours for theirs, ours in zip(took[peer], took["ours"], strict=True)]
    ratios = {peer: one[peer] / one["ours"] for peer, one in seconds.items()}
    ceilings = {peer: flops[peer] / flops["ours"] for peer in ratios}
    best = {"ours": min(one["ours"] for one in seconds.values())} | {peer: one[peer] for peer, one in seconds.items()}
    return {
        **result,
        **{key: work[key] for key in ("rows", "contexts", "prompt_tokens")},
        "flops": flops,
        "seconds": seconds,
        "ratio": ratios,
        "ratio_by_batch": by_batch,
        "flop_ceiling": ceilings,
        "share_of_ceiling": {peer: ratios[peer] / ceilings[peer] for peer in ratios},
        "samples_per_second": {side: work["rows"] / one for side, one in best.items()},
        "useful_tokens_per_second": {side: work["prompt_tokens"] / one for side, one in best.items()},
    }


def rate(found: dict[str, Any], ceiling: float) -> None:
    """Add to all phases what share of a matrix product's operations per second their sides reach."""
    for one in found.values():
        rates = one["samples_per_second"].items()
        one["share_of_matrix_ceiling"] = {
            side: one["flops"][side] / one["rows"] * rows / ceiling for side, rows in rates
        }


def collect(found: dict[str, Any], key: str) -> dict[str, dict[str, float]]:
    """Return a figure by peer and phase. A cache is compared with the peers' plain stage 2: they have none."""
    return {
        f"vs_{peer}": {phase: round(one[key][peer], 3) for phase, one in found.items() if peer in one[key]}
        for peer in PEERS
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw the ratios, with the ceilings as marks."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(PEERS)
    for number, peer in enumerate(PEERS):
        places = [place + number * width for place in range(len(found))]
        axis.bar(places, [one["ratio"].get(peer, 0) for one in found.values()], width, label=f"against {peer}")
        axis.scatter(places, [one["flop_ceiling"].get(peer, 0) for one in found.values()], color="k", marker="_", s=200)
    axis.axhline(1, color="gray", linewidth=0.8)
    axis.set(xticks=[place + width for place in range(len(found))], ylabel="times as fast (black: operations)")
    axis.set_xticklabels(list(found))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure phase after phase; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, batches=4)
    arguments = parser.parse_args()
    device_name = name_device() + arguments.suffix
    path = arguments.output / f"throughput_{device_name}.json"
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"phases": {}}
    found: dict[str, Any] = before["phases"]
    with prepare_comparison(arguments) as comparison:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ceiling = measure_matrix_ceiling(device, resolve_dtype(comparison.config.llm.dtype))
        described = comparison.describe(arguments.threads)
        if before.get("hardware") == described["hardware"]:  # a noisy machine's best counts
            ceiling = max(ceiling, before["matrix_ceiling_flops"])
        for phase in arguments.phases:
            result = comparison.measure_phase(phase, arguments.peers)
            found[phase] = summarize(phase, comparison.work[phase], result)
            rate(found, ceiling)
            print(f"{phase}: {found[phase]['ratio']} of at most {found[phase]['flop_ceiling']}", flush=True)
            record = {
                "question": "How many times faster than today's usual ways, on the same rows?",
                "ratios": collect(found, "ratio"),
                "flop_ceiling": collect(found, "flop_ceiling"),
                "share_of_ceiling": collect(found, "share_of_ceiling"),
                "matrix_ceiling_flops": ceiling,
                "phases": found,
                **described,
            }
            write_json(path, record)
        plot(found, arguments.output / f"throughput_{device_name}.png")


if __name__ == "__main__":
    main()
