"""How do speed and memory of tuning grow with the prompt, the targets of a context and the model?

    python -m benchmarks.tuning_growth --run-dir RUN [--sweeps prompt targets model] [--shapes 7m 20m 40m] [--repeats 2]

RUN is a run of configs/ml1m_official.yaml whose data and CF steps are done. One sweep changes one thing: the films
shown in a prompt, the number of targets that each context has (32 rows a batch all the same), the backbone's size
(random weights, ``lib/random_backbone.py``). At each point ours and plain padded rows (logits at the last position
alone) work in turn through the same global batch, in both stages. Writes tuning_growth_<device>.json, and a plot for
each sweep.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.growth_plot import plot_growth
from benchmarks.lib.machine import describe_hardware, name_device
from benchmarks.lib.random_backbone import SHAPES, write_random_backbone
from benchmarks.lib.tuning_side import Reference, build_ours, measure
from benchmarks.lib.tuning_workload import choose_blocks, prepare_run, spell_rows
from collm_dist.config import Config
from collm_dist.data.prompts.template import resolve_answer_ids
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.llm.backbone import resolve_dtype
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.stage import get_stage

ROOT = Path(__file__).resolve().parent.parent
HISTORY_LENGTHS = (1, 4, 10, 25)
TARGETS = (1, 2, 4, 8, 16, 32)
STAGES = ("stage1", "stage2")
AXES = {"prompt": "prompt tokens", "targets": "targets of a context", "model": "parameters"}


def list_points(sweep: str, shapes: list[str], folder: Path, longest: int) -> list[tuple[str, list[str]]]:
    """Return a sweep's points: what the phase's name ends with, and settings.

    Args:
        sweep, shapes: as asked for.
        folder: of the backbones.
        longest: history that the shards hold.
    """
    base = f"llm.backbone={folder / shapes[len(shapes) // 2]}"
    if sweep == "prompt":
        return [("", [base, f"prompt.history_length={count}"]) for count in HISTORY_LENGTHS if count <= longest]
    if sweep == "targets":
        return [(f"_targets_{count}", [base]) for count in TARGETS]
    return [("", [f"llm.backbone={folder / shape}"]) for shape in shapes]


def measure_point(config: Config, stage: str, suffix: str, repeats: int) -> dict[str, Any]:
    """Let both sides work through one batch in turn, after a pass to warm up."""
    phase = stage + suffix
    loaded = get_stage(config, stage).build(RunDir(Path(config.run.dir)), torch.device("cpu"))  # type: ignore[arg-type]
    (block,) = choose_blocks(config, phase, 1)
    with torch.no_grad():
        batch = spell_rows(loaded, block)
    answers = resolve_answer_ids(loaded.backbone.tokenizer, config.prompt.yes, config.prompt.no)
    parameters = sum(one.numel() for one in loaded.backbone.model.parameters())
    del loaded
    ours, device, _ = build_ours(config, phase, 1)
    plain = Reference(config, {"batches": [batch], "answer_ids": answers}, stage, device, last=True)
    samples: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    for _ in range(1 + repeats):
        for side, work in (("ours", ours), ("plain", plain.work)):
            samples[side].append(measure(work, 0, device))
    found: dict[str, Any] = {
        "rows": len(batch),
        "contexts": block.num_contexts,
        "prompt tokens": sum(len(row["ids"]) for row in batch) / len(batch),
        "targets of a context": len(batch) / block.num_contexts,
        "parameters": parameters,
        "samples": samples,
    }
    for side, taken in samples.items():
        kept = taken[1:]
        found[side] = {
            "samples_per_second": len(batch) / min(one["seconds"] for one in kept),
            "extra_gib": max(one["extra_bytes"] for one in kept) / 2**30,
        }
    return found


def plot(points: list[dict[str, Any]], sweep: str, path: Path) -> None:
    """Draw a sweep."""
    labels = {"samples/s": "samples_per_second", "GiB above the weights": "extra_gib"}
    panels = {
        label: {
            f"{stage}, {side}": [(one[AXES[sweep]], one[side][key]) for one in points if one["stage"] == stage]
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
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct-q4_1", help="backbone whose tokenizer is taken")
    parser.add_argument("--repeats", type=int, default=2, help="samples of each side at each point")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings for both sides")
    arguments = parser.parse_args()
    name = f"tuning_growth_{name_device()}"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for shape in arguments.shapes:
            write_random_backbone(Path(temporary) / shape, shape, arguments.tokenizer, resolve_dtype("auto"))
        longest = load_manifest(arguments.run_dir / "data").max_history_length
        for sweep in arguments.sweeps:
            found[sweep] = []
            for suffix, settings in list_points(sweep, arguments.shapes, Path(temporary), longest):
                config = prepare_run(arguments.config, None, arguments.run_dir, [*arguments.overrides, *settings])
                for stage in STAGES:
                    point = measure_point(config, stage, suffix, arguments.repeats) | {"stage": stage}
                    found[sweep].append(point)
                    print(
                        f"{sweep} {point[AXES[sweep]]:,.0f} {stage}: {point['ours']} plain: {point['plain']}",
                        flush=True,
                    )
            plot(found[sweep], sweep, arguments.output / f"{name}_{sweep}.png")
            record = {"question": __doc__.splitlines()[0], "sweeps": found, "hardware": describe_hardware()}
            write_json(arguments.output / f"{name}.json", record)


if __name__ == "__main__":
    main()
