"""How fast are training, validation and scoring, beside what people use today? One run, the sides in turn.

    python benchmarks/throughput.py --data DIR [--phases stage1 stage2 ...] [--batches 4] [key=value ...]

DIR holds interactions.parquet and items.parquet as configs/ml1m_official.yaml wants them. The peers are those of
benchmarks/tuning_side.py: transformers.Trainer, and the authors' recipe with logits at all positions or at the last
one. All sides work through the same global batches, taken evenly from a whole epoch in training order; ratios are
their seconds over ours, of all batches together. ``flop_ceiling`` is the same ratio of operations, with no padding on
our side: the most that can be had. Each side runs in a process of its own, whose memory is measured as well. Writes
throughput_<device>.json and .png, and memory_<device>.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from benchmarks.machine import describe_hardware
from benchmarks.side_process import SideProcess
from benchmarks.tuning_side import REFERENCE_ROWS
from benchmarks.tuning_workload import (
    PHASES,
    TRAINING,
    choose_blocks,
    measure_matrix_ceiling,
    prepare_run,
    spell_rows,
    write_rows,
)
from collm_dist.artifacts import RunDir, write_json
from collm_dist.config import Config
from collm_dist.data.prompts import resolve_answer_ids
from collm_dist.llm.backbone import resolve_dtype
from collm_dist.tuning.costs import DecoderShape, count_padded, count_shared
from collm_dist.tuning.stages import LoadedStage, build_stage, get_stage

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "deepspeed")
PEERS = ("hf_trainer", "reference", "reference_last")


def write_workload(config: Config, folder: Path, phases: list[str], count: int) -> dict[str, Any]:
    """Write each phase's rows for the peers, and return what they cost and have."""
    found = {}
    device = torch.device("cpu")
    for phase in phases:
        loaded = build_stage(
            config, RunDir(Path(config.run.dir)), get_stage(config, "stage1" if phase == "stage1" else "stage2"), device
        )
        blocks = choose_blocks(config, phase, count)
        with torch.no_grad():
            batches = [spell_rows(loaded, block) for block in blocks]
        answers = resolve_answer_ids(loaded.backbone.tokenizer, config.prompt.yes, config.prompt.no)
        write_rows(folder / f"{phase}.json", batches, answers)
        found[phase] = describe_workload(loaded, phase, blocks, batches)
    return found


def describe_workload(loaded: LoadedStage, phase: str, blocks: list[Any], batches: list[Any]) -> dict[str, Any]:
    """Return rows, contexts, useful tokens and operations of a phase's batches."""
    shape, training = DecoderShape.from_model(loaded.backbone.model), phase in TRAINING
    ours = [
        count_shared(shape, loaded.collator.collate(block, block), training=training, cached=phase == "stage2_cached")
        for block in blocks
    ]
    lengths = [[len(row["ids"]) for row in batch] for batch in batches]
    return {
        "rows": sum(map(len, batches)),
        "contexts": sum(block.num_contexts for block in blocks),
        "prompt_tokens": sum(map(sum, lengths)),
        "flops": {"ours": sum(one.flops for one in ours)},
        "lengths": lengths,
        "shape": shape,
    }


def count_peer(work: dict[str, Any], peer: str, phase: str, rows: int) -> int:
    """Return the operations of a peer's padded rows."""
    total = 0
    for lengths in work["lengths"]:
        ordered = sorted(lengths) if peer == "hf_trainer" else lengths
        for first in range(0, len(ordered), rows):
            part = ordered[first : first + rows]
            width = max(part) + (peer == "hf_trainer")  # the answer is a label there
            full = peer != "reference_last"
            total += count_padded(work["shape"], len(part), width, training=phase in TRAINING, full_head=full).flops
    return total


def start(side: str, phase: str, config_path: Path, rows: Path, count: int) -> SideProcess:
    """Start a side."""
    command = [sys.executable, "-m", "benchmarks.tuning_side", "--side", side, "--phase", phase]
    command += ["--config", str(config_path), "--rows", str(rows), "--batches", str(count)]
    return SideProcess(command, os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"})


def measure_phase(phase: str, config_path: Path, folder: Path, count: int, peers: tuple[str, ...]) -> dict[str, Any]:
    """Let all sides work through the batches of a phase in turn."""
    sides = {side: start(side, phase, config_path, folder / f"{phase}.json", count) for side in ("ours", *peers)}
    samples: dict[str, list[Any]] = {side: [] for side in sides}
    loads = []
    for number in range(count):
        loads.append(round(os.getloadavg()[0], 2))
        for side, process in sides.items():
            samples[side].append(process.ask(str(number)))
            print(f"{phase} {number} {side}: {samples[side][-1]['seconds']:.2f} s", flush=True)
    for process in sides.values():
        process.close()
    return {"samples": samples, "ready": {side: one.ready for side, one in sides.items()}, "load_average": loads}


def summarize(phase: str, work: dict[str, Any], result: dict[str, Any], ceiling: float) -> dict[str, Any]:
    """Add ratios and rates to a phase's samples."""
    seconds = {side: [one["seconds"] for one in samples] for side, samples in result["samples"].items()}
    total = {side: sum(values) for side, values in seconds.items()}
    flops = dict(work["flops"])
    for peer in total.keys() - {"ours"}:
        flops[peer] = count_peer(work, peer, phase, result["ready"][peer]["rows_per_micro_batch"])
    ratios = {peer: total[peer] / total["ours"] for peer in PEERS if peer in total}
    ceilings = {peer: flops[peer] / flops["ours"] for peer in ratios}
    return {
        **result,
        "rows": work["rows"],
        "contexts": work["contexts"],
        "prompt_tokens": work["prompt_tokens"],
        "flops": flops,
        "seconds": total,
        "ratio": ratios,
        "ratio_by_batch": {
            peer: [theirs / ours for theirs, ours in zip(seconds[peer], seconds["ours"], strict=True)]
            for peer in ratios
        },
        "flop_ceiling": ceilings,
        "share_of_ceiling": {peer: ratios[peer] / ceilings[peer] for peer in ratios},
        "samples_per_second": {side: work["rows"] / one for side, one in total.items()},
        "useful_tokens_per_second": {side: work["prompt_tokens"] / one for side, one in total.items()},
        "share_of_matrix_ceiling": {side: flops[side] / total[side] / ceiling for side in total},
        "peak_extra_gib": {
            side: max(one["extra_bytes"] for one in samples) / 2**30 for side, samples in result["samples"].items()
        },
    }


def collect(found: dict[str, Any], key: str) -> dict[str, dict[str, float]]:
    """Return a figure by peer and phase. A cache is compared with the peers' plain stage 2: they have none."""
    return {
        f"vs_{peer}": {phase: round(one[key][peer], 3) for phase, one in found.items() if peer in one[key]}
        for peer in PEERS
    }


def write_records(
    folder: Path, device_name: str, found: dict[str, Any], described: dict[str, Any], ceiling: float
) -> None:
    """Write both results: how fast, and in how much memory above the weights."""
    write_json(
        folder / f"throughput_{device_name}.json",
        {
            "question": "How many times faster than today's usual ways, on the same rows?",
            "ratios": collect(found, "ratio"),
            "flop_ceiling": collect(found, "flop_ceiling"),
            "share_of_ceiling": collect(found, "share_of_ceiling"),
            "matrix_ceiling_flops": ceiling,
            **described,
        },
    )
    peaks = {phase: one["peak_extra_gib"] for phase, one in found.items()}
    write_json(
        folder / f"memory_{device_name}.json",
        {
            "question": "How much memory above the weights does a step take, as a share of what others take?",
            "ratios": {
                f"vs_{peer}": {
                    phase: round(sides["ours"] / sides[peer], 3) for phase, sides in peaks.items() if peer in sides
                }
                for peer in PEERS
            },
            "peak_extra_gib": peaks,
            **{key: value for key, value in described.items() if key != "phases"},
        },
    )


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
    parser.add_argument("--data", type=Path, required=True, help="folder with interactions.parquet and items.parquet")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ml1m_official.yaml")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--batches", type=int, default=4, help="global batches of each phase")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side, on a CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("overrides", nargs="*", help="key=value, for all sides")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    device_name = "gpu" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare_run(arguments.config, arguments.data.resolve(), folder / "run", arguments.overrides)
        config_path = folder / "config.yaml"
        config_path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        cached = config.model_copy(update={"stage2": config.stage2.model_copy(update={"context_cache": "memory"})})
        cached_path = folder / "cached.yaml"
        cached_path.write_text(yaml.safe_dump(cached.model_dump(mode="json")), encoding="utf-8")
        work = write_workload(config, folder, arguments.phases, arguments.batches)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ceiling = measure_matrix_ceiling(device, resolve_dtype(config.llm.dtype))
        for phase in arguments.phases:
            path = cached_path if phase == "stage2_cached" else config_path
            result = measure_phase(phase, path, folder, arguments.batches, tuple(arguments.peers))
            found[phase] = summarize(phase, work[phase], result, ceiling)
            print(f"{phase}: {found[phase]['ratio']} of at most {found[phase]['flop_ceiling']}", flush=True)
            described = {
                "phases": found,
                "config": {"backbone": config.llm.backbone, "dtype": config.llm.dtype, "threads": arguments.threads,
                           "batches": arguments.batches, "reference_rows": REFERENCE_ROWS,
                           "max_tokens": config.stage1.max_tokens_per_micro_batch},
                "hardware": describe_hardware(),
                "versions": {one: importlib.metadata.version(one) for one in PACKAGES},
            }  # fmt: skip
            write_records(arguments.output, device_name, found, described, ceiling)
        plot(found, arguments.output / f"throughput_{device_name}.png")


if __name__ == "__main__":
    main()
