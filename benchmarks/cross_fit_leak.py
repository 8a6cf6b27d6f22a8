"""What does it cost to train stage 2 on rows that the CF model was fitted to?

    python -m benchmarks.cross_fit_leak --data DIR [--config configs/ml1m_official.yaml] [--folds 0 4 8 16]

Measured without a language model. The CF model is trained the paper's way (0 folds) and cross-fitted. For each kind of
slots, an MLP is fitted to the slot inputs of the training rows and scored on train, valid and test, for several seeds.
The gap between train and test shows how much the MLP trusts inputs that have seen the label. DIR holds
interactions.parquet and items.parquet. Writes cross_fit_ml1m.json and .png.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.lib.machine import RESULTS, ROOT, describe_run
from collm_dist.cf.model_files import load_cf_model
from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.data.shards.context_block import ContextBlock, concatenate_blocks
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.evaluation.slot_inputs import build_slot_inputs
from collm_dist.evaluation.slots_mlp import fit_slots_mlp
from collm_dist.metrics import compute_auc, compute_uauc
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.preprocess import run_preprocess
from collm_dist.orchestration.pretrain import run_pretrain
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir

SLOTS = {
    "vectors": frozenset({"UserID", "TargetItemID"}),
    "statistics": frozenset({"MatchID"}),
    "both": frozenset({"UserID", "TargetItemID", "MatchID"}),
}
SPLITS = ("train", "valid", "test")


def load_blocks(config: Config, run_dir: RunDir) -> dict[str, ContextBlock]:
    """Load all rows of each split."""
    data_dir = run_dir.step_dir("data")
    manifest = load_manifest(data_dir)
    orders = {split: GlobalOrder(data_dir, manifest, split, 0, 1 << 16, shuffle=False) for split in SPLITS}
    return {split: concatenate_blocks(list(order.iter_batches(0))) for split, order in orders.items()}


def measure(config: Config, run_dir: RunDir, blocks: dict[str, ContextBlock], seeds: int) -> dict[str, Any]:
    """Fit MLPs to the slot inputs of the run's CF model; return AUC by kind of slots and split."""
    manifest = load_manifest(run_dir.step_dir("data"))
    cf_model = load_cf_model(run_dir, manifest)
    by_kind: dict[str, Any] = {}
    for kind, slots in SLOTS.items():
        inputs = {
            split: build_slot_inputs(block, slots, cf_model, manifest.max_history_length, config.prompt.history_length)
            for split, block in blocks.items()
        }
        values: dict[str, list[float]] = {name: [] for name in (*SPLITS, "test_uauc")}
        for seed in range(seeds):
            train, valid = ((inputs[split], blocks[split].label) for split in ("train", "valid"))
            mlp = fit_slots_mlp(train, valid, seed, batch_size=1024)
            scores = {split: mlp.score(inputs[split]) for split in SPLITS}
            for split, block in blocks.items():
                values[split].append(compute_auc(block.label, scores[split]) or 0.5)
            test = blocks["test"]
            uauc = compute_uauc(test.label, scores["test"], test.user_idx[test.target_contexts])[0]
            values["test_uauc"].append(uauc or 0.5)
        by_kind[kind] = {
            name: {"mean": float(np.mean(scores)), "std": float(np.std(scores, ddof=1)) if seeds > 1 else 0.0}
            for name, scores in values.items()
        }
        by_kind[kind]["gap"] = by_kind[kind]["train"]["mean"] - by_kind[kind]["test"]["mean"]
    return by_kind


def plot(runs: dict[str, Any], path: Path) -> None:
    """Draw train and test AUC for each kind of slots and number of folds."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, len(SLOTS), sharey=True)
    for axis, kind in zip(axes, SLOTS, strict=True):
        for split, color in zip(SPLITS, ("C3", "C1", "C0"), strict=True):
            axis.plot([run[kind][split]["mean"] for run in runs.values()], marker="o", color=color, label=split)
        labels = ["off" if name == "0" else name for name in runs]
        axis.set(title=kind, xticks=range(len(runs)), xticklabels=labels, xlabel="cf.cross_fit (folds)")
        axis.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("AUC of slots without LLM")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure each number of folds on the same data step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with interactions.parquet and items.parquet")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ml1m_official.yaml")
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 4, 8, 16], help="values of cf.cross_fit; 0 = off")
    parser.add_argument("--seeds", type=int, default=5, help="MLPs fitted for each kind of slots")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        run_dir, data = RunDir(Path(folder)), arguments.data.resolve()
        for folds in arguments.folds:
            overrides = [
                f"run.dir={folder}",
                f"dataset.path={data / 'interactions.parquet'}",
                f"dataset.items_path={data / 'items.parquet'}",
                "preprocessing.ties=strict",  # rows of the same second are unknown, so they cannot leak
                f"cf.cross_fit={folds}",
                "monitoring.progress_bar=false",
            ]
            config = load_config(arguments.config, overrides)
            with connect_ray(config.cluster):
                run_preprocess(config, run_dir)
                run_pretrain(config, run_dir, force=True)
            runs[str(folds)] = measure(config, run_dir, load_blocks(config, run_dir), arguments.seeds)
            for kind, values in runs[str(folds)].items():
                shown = "  ".join(f"{name} {values[name]['mean']:.4f}" for name in ("train", "test", "test_uauc"))
                print(f"folds {folds}: {kind:10} {shown}", flush=True)
    record = {
        "question": __doc__.splitlines()[0],
        "runs": runs,
        "config": config.cf.model_dump(mode="json"),
        "seeds": arguments.seeds,
        **describe_run("torch", "ray", "numpy"),
    }
    write_json(arguments.output / "cross_fit_ml1m.json", record)
    plot(runs, arguments.output / "cross_fit_ml1m.png")


if __name__ == "__main__":
    main()
