"""How do speed and memory of tuning grow with the prompt, the targets of a context and the model?

    python -m benchmarks.tuning_growth --run-dir RUN [--sweeps prompt targets model] [--shapes 7m 20m 40m] [--repeats 2]

RUN is a run of configs/ml1m_official.yaml whose data and CF steps are done. Each sweep changes one thing: the titles
shown in a prompt, the targets of each context (32 rows a batch throughout), or the size of the backbone (random
weights, ``lib/random_backbone.py``). At each point our step and a step on padded rows (logits at the last position
only) take turns on the same global batch, in both stages. Writes tuning_growth_<device>.json and a plot of each sweep.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.growth_plot import plot_growth
from benchmarks.lib.machine import RESULTS, ROOT, TUNING_PACKAGES, describe_run, name_device
from benchmarks.lib.padded_model import ReferenceStep, build_padded_model
from benchmarks.lib.random_backbone import SHAPES, write_random_backbone
from benchmarks.lib.step_meter import measure
from benchmarks.lib.tuning_side import build_ours
from benchmarks.lib.tuning_workload import prepare_run, sample_batches, spell_rows, take_targets
from collm_dist.config import Config
from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.llm.backbone import resolve_dtype
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.stage import get_stage

HISTORY_LENGTHS = (1, 4, 10, 25)
TARGETS = (1, 2, 4, 8, 16, 32)
STAGES = ("stage1", "stage2")
AXES = {"prompt": "prompt tokens", "targets": "targets of a context", "model": "parameters"}


def list_points(sweep: str, shapes: list[str], folder: Path, max_history: int) -> list[tuple[list[str], int | None]]:
    """Return a sweep's points: settings, and targets per context (None = as in the data).

    Args:
        sweep: a key of ``AXES``.
        shapes: of the backbones.
        folder: of the backbones.
        max_history: longest history in the shards.
    """
    base = f"llm.backbone={folder / shapes[len(shapes) // 2]}"
    if sweep == "prompt":
        lengths = [length for length in HISTORY_LENGTHS if length <= max_history]
        return [([base, f"prompt.history_length={length}"], None) for length in lengths]
    if sweep == "targets":
        return [([base], count) for count in TARGETS]
    return [([f"llm.backbone={folder / shape}"], None) for shape in shapes]


def measure_point(config: Config, stage: str, targets: int | None, repeats: int) -> dict[str, Any]:
    """Let both sides take turns on one batch, after a pass to warm up."""
    loaded = get_stage(config, stage).build(RunDir(Path(config.run.dir)), torch.device("cpu"))  # type: ignore[arg-type]
    blocks = sample_batches(config, stage, 1 if targets is None else 4).blocks
    block = blocks[0] if targets is None else take_targets(blocks, targets)
    with torch.no_grad():
        batch = spell_rows(loaded, block)
    answers = resolve_answer_ids(loaded.backbone.tokenizer, config.prompt.yes, config.prompt.no)
    parameters = sum(parameter.numel() for parameter in loaded.backbone.model.parameters())
    del loaded
    ours, rows = build_ours(config, stage, [block]), {"batches": [batch], "answer_ids": answers}
    padded = ReferenceStep(build_padded_model(config, rows, stage, ours.device), rows, ours.device, last=True)
    samples: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    for _ in range(1 + repeats):
        for side, work in (("ours", ours.work), ("plain", padded.work)):
            samples[side].append(measure(work, 0, ours.device))
    point: dict[str, Any] = {
        "rows": len(batch),
        "contexts": block.num_contexts,
        "prompt tokens": sum(len(row["ids"]) for row in batch) / len(batch),
        "targets of a context": len(batch) / block.num_contexts,
        "parameters": parameters,
        "samples": samples,
    }
    for side, taken in samples.items():
        measured = taken[1:]
        point[side] = {
            "samples_per_second": len(batch) / min(sample["seconds"] for sample in measured),
            "extra_gib": max(sample["extra_bytes"] for sample in measured) / 2**30,
        }
    return point


def plot(points: list[dict[str, Any]], sweep: str, path: Path) -> None:
    """Draw a sweep."""
    labels = {"samples/s": "samples_per_second", "GiB above the weights": "extra_gib"}
    panels = {
        label: {
            f"{stage}, {side}": [(point[AXES[sweep]], point[side][key]) for point in points if point["stage"] == stage]
            for stage in STAGES
            for side in ("ours", "plain")
        }
        for label, key in labels.items()
    }
    plot_growth(panels, AXES[sweep], path)


def main() -> None:
    """Measure sweep after sweep; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="a run whose data and CF steps are done")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ml1m_official.yaml")
    parser.add_argument("--sweeps", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--shapes", nargs="+", default=["7m", "20m", "40m"], choices=SHAPES, help="of the backbones")
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct-q4_1", help="backbone that lends its tokenizer")
    parser.add_argument("--repeats", type=int, default=2, help="samples of each side at each point")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings for both sides")
    arguments = parser.parse_args()
    name = f"tuning_growth_{name_device()}"
    sweeps: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for shape in arguments.shapes:
            write_random_backbone(Path(temporary) / shape, shape, arguments.tokenizer, resolve_dtype("auto"))
        max_history = load_manifest(arguments.run_dir / "data").max_history_length
        for sweep in arguments.sweeps:
            sweeps[sweep] = []
            for settings, targets in list_points(sweep, arguments.shapes, Path(temporary), max_history):
                config = prepare_run(arguments.config, None, arguments.run_dir, [*arguments.overrides, *settings])
                for stage in STAGES:
                    point = measure_point(config, stage, targets, arguments.repeats) | {"stage": stage}
                    sweeps[sweep].append(point)
                    shown = f"ours {point['ours']}, plain {point['plain']}"
                    print(f"{sweep} {point[AXES[sweep]]:,.0f} {stage}: {shown}", flush=True)
            plot(sweeps[sweep], sweep, arguments.output / f"{name}_{sweep}.png")
            record = {"question": __doc__.splitlines()[0], "sweeps": sweeps, **describe_run(*TUNING_PACKAGES)}
            write_json(arguments.output / f"{name}.json", record)


if __name__ == "__main__":
    main()
