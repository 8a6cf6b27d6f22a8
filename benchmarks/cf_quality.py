"""How good are the four CF models on CoLLM's ML-1M split, compared with the baselines?

    python -m benchmarks.cf_quality --data DIR [--models mf lightgcn sasrec din] [--seeds 0 1 2 3 4]

DIR holds interactions.parquet and items.parquet as configs/ml1m_official.yaml expects them. Each model runs with the
settings of its own config (configs/ml1m_*.yaml), which were chosen on validation rows only; the test rows are scored
once, by the weights of the best epoch on validation. The result has mean and spread over seeds. Writes
cf_quality_ml1m.json and .png; models that are not measured keep their earlier entries.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.lib.machine import RESULTS, ROOT, describe_run
from collm_dist.cf.model_files import load_cf_model
from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.cf.trainer import measure_scores
from collm_dist.config.loader import load_config
from collm_dist.data.samples.pair_features import compute_pair_features
from collm_dist.data.shards.context_block import concatenate_blocks
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.interactions import load_interactions
from collm_dist.data.shards.manifest import Manifest, load_manifest
from collm_dist.evaluation.baselines import TRAIN_COLUMNS, fit_as_of_logistic, fit_item_mean
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.preprocess import run_preprocess
from collm_dist.orchestration.pretrain import run_pretrain
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir

# Config and further settings of each entry, all chosen on validation rows.
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mf": ("ml1m_official.yaml", ()),
    "lightgcn": ("ml1m_lightgcn.yaml", ()),
    "sasrec": ("ml1m_sasrec.yaml", ()),
    "din": ("ml1m_din.yaml", ()),
    # Biases fitted to all training rows would hide what was known as of each row, so their prior is strong.
    "mf_all_feedback": (
        "ml1m_official.yaml",
        ("cf.feedback=all", "cf.bias_weight_decay=100", "cf.learning_rate=1e-2"),
    ),
}
# Test AUC / UAUC that the paper reports for its own runs of these models (arXiv 2310.19488, table 2).
PUBLISHED = {"mf": (0.6482, 0.6361), "lightgcn": (0.5959, 0.6499), "sasrec": (0.7078, 0.6884), "din": (0.7166, 0.6459)}


def measure(name: str, data: Path, folder: Path, seeds: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a model once per seed and return its metrics and those of the baselines."""
    overrides = [
        f"run.dir={folder}",
        f"dataset.path={data / 'interactions.parquet'}",
        f"dataset.items_path={data / 'items.parquet'}",
        f"cf.seeds={seeds}",
        "cf.cross_fit=off",
        *MODELS[name][1],
        "monitoring.progress_bar=false",
    ]
    config = load_config(ROOT / "configs" / MODELS[name][0], overrides)
    run_dir = RunDir(folder)
    with connect_ray(config.cluster):
        run_preprocess(config, run_dir)
        summary = run_pretrain(config, run_dir, force=True)
    data_dir = run_dir.step_dir("data")
    manifest = load_manifest(data_dir)
    slices = measure_slices(load_cf_model(run_dir, manifest), data_dir, manifest)
    test = summary["spread"]["test"]
    metrics = {
        "auc_mean": test["auc"]["mean"],
        "auc_std": test["auc"]["std"],
        "uauc_mean": test["uauc"]["mean"],
        "uauc_std": test["uauc"]["std"],
        "seeds": seeds,
        "valid": summary["spread"]["valid"],
        "by_seed": summary["seeds"],
        "slices_of_first_seed": slices,
        "settings": config.cf.model_dump(mode="json"),
        "published_auc_uauc": PUBLISHED.get(name),
    }
    return metrics, summary["baselines"]


@torch.no_grad()
def measure_slices(model: SlotVectors, data_dir: Path, manifest: Manifest) -> dict[str, Any]:
    """Return AUC and UAUC of test rows, warm and cold, of the model, the as-of logistic and the item mean."""
    train = load_interactions(data_dir, TRAIN_COLUMNS, "train")
    item_mean = fit_item_mean(train, manifest.num_items)
    order = GlobalOrder(data_dir, manifest, "test", 0, 1 << 16, shuffle=False)
    block = concatenate_blocks(list(order.iter_batches()))
    users = block.user_idx[block.target_contexts]
    history = np.full((block.num_contexts, manifest.max_history_length), -1)
    lengths = np.diff(block.history_offsets)
    columns = np.arange(manifest.max_history_length) >= manifest.max_history_length - lengths[:, None]
    history[columns] = block.history_items
    pairs = (users, history[block.target_contexts], block.item_idx, compute_pair_features(block))
    scores = model.score(*(torch.from_numpy(np.ascontiguousarray(array)) for array in pairs)).numpy()
    as_of = fit_as_of_logistic(train)(block)
    warm = (block.user_in_train == 1) & (block.item_in_train == 1)
    slices = {"all": np.ones_like(warm), "warm": warm, "cold": ~warm, "cold user": block.user_in_train == 0}
    return {
        name: {
            "rows": int(chosen.sum()),
            "model": measure_scores(block.label[chosen], scores[chosen], users[chosen]),
            "as_of_logistic": measure_scores(block.label[chosen], as_of[chosen], users[chosen]),
            "item_mean": measure_scores(block.label[chosen], item_mean(block)[chosen], users[chosen]),
        }
        for name, chosen in slices.items()
    }


def plot(models: dict[str, Any], baselines: dict[str, Any], path: Path) -> None:
    """Draw the test AUC of each seed, the published AUC and the baselines."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axis = figure.subplots()
    for place, model in enumerate(models.values()):
        values = [scores["test"]["auc"] for scores in model["by_seed"].values()]
        axis.scatter(
            [place] * len(values), values, label="ours, each seed" if place == 0 else None, color="C0", alpha=0.7
        )
        if model["published_auc_uauc"] is None:
            continue
        label = "as published" if place == 0 else None
        axis.scatter([place], model["published_auc_uauc"][:1], marker="x", color="C3", label=label)
    for number, (name, scores) in enumerate(baselines.items()):
        axis.axhline(
            scores["test"]["auc"], color="gray", linestyle=("--", ":")[number % 2], label=name.replace("_", " ")
        )
    axis.set(xticks=range(len(models)), xticklabels=list(models), ylabel="test AUC")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure model after model; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with interactions.parquet and items.parquet")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    path = arguments.output / "cf_quality_ml1m.json"
    models: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            models[name], baselines = measure(name, arguments.data.resolve(), Path(folder), arguments.seeds)
            shutil.rmtree(Path(folder) / "cf")
            write_json(
                path,
                {
                    "question": __doc__.splitlines()[0],
                    "models": models,
                    "baselines": baselines,
                    "load_average": os.getloadavg()[0],
                    **describe_run("torch", "ray", "numpy"),
                },
            )
            plot(models, baselines, arguments.output / "cf_quality_ml1m.png")


if __name__ == "__main__":
    main()
