"""How fast is a training epoch of the CF models on a CPU, compared with RecBole?

    python -m benchmarks.cf_throughput [--data data/ml-1m-collm] [--models mf lightgcn sasrec din] [--threads 2 1]

Install RecBole once, in an environment of its own (1 GB; RecBole 1.2.1 needs older libraries):

    python3.11 -m venv ~/.cache/collm-dist/recbole-env && ~/.cache/collm-dist/recbole-env/bin/pip install \
        recbole==1.2.1 torch==2.13.0 numpy==1.26.4 pandas==2.2.3 scipy==1.11.4 "setuptools<81"

The data are interactions.parquet and items.parquet as in configs/ml1m_official.yaml, or MovieLens-100K if they are
missing; with --interactions N they are generated (benchmarks/lib/synthetic_logs.py), for a larger catalogue:

    python -m benchmarks.cf_throughput --interactions 1e7 --models mf lightgcn din --max-batches 20 \
        --out benchmarks/results/cf_throughput_10m_cpu.json

A sample is one epoch of training without evaluation, on the same rows with the same dimensions and batch size: our
trainer's ``train_epoch`` against RecBole's ``Trainer._train_epoch``. The sides take turns, each in a process of its own
and after a warm-up epoch. ``ratios`` are RecBole's median over ours, for the same number of batches. With
``--max-batches`` a sample is so many batches; one more batch before them, with the order of the epoch, is not counted
on either side, and RecBole's sequential models get as many rows as they train on.

``ratios_by_threads`` also has the ratios of CPU time, which depend less on other processes. ``share_of_limit`` is the
least time of a batch on this machine (benchmarks/lib/cf_limits.py) over our median CPU time per thread.

    model     RecBole's     made equal
    mf        FM            fields user_id and item_id only: first-order terms are biases, second-order <user, item>
    lightgcn  LightGCN      its forward pass; the loss is binary cross-entropy of the rows instead of BPR
    sasrec    SASRec        the same; no dropout in attention, ReLU, inner width = width, as ours
    din       DIN           attention MLP and final MLP 80-40 on both sides
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib.machine import RESULTS, ROOT, describe_run
from benchmarks.lib.side_process import SideProcess, build_environment
from benchmarks.lib.synthetic_logs import write_synthetic_logs
from collm_dist.cf.batches import Rows
from collm_dist.cf.user_shards import load_worker_data
from collm_dist.config.loader import load_config
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.orchestration.preprocess import run_preprocess
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir

HISTORY_LENGTH, BATCH_ROWS, LEARNING_RATE, WEIGHT_DECAY = 25, 2048, 1e-3, 5.0
# Shorter epochs are measured that many times as often.
SHORT_EPOCH_SECONDS, SHORT_EPOCH_REPEATS = 1.0, 3


@dataclass(frozen=True)
class Pair:
    """A model on both sides.

    Attributes:
        ours: settings of the ``cf`` section.
        recbole: RecBole's name of the model.
        settings: RecBole's settings.
        differs: remaining differences.
    """

    ours: dict[str, Any]
    recbole: str
    settings: dict[str, Any]
    differs: str


PAIRS = {
    "mf": Pair({}, "FM", {"embedding_size": 64}, "nothing"),
    "lightgcn": Pair(
        {"num_layers": 2},
        "LightGCN",
        {"embedding_size": 64, "n_layers": 2, "reg_weight": 0.0},
        "ours has biases, RecBole's has none",
    ),
    "sasrec": Pair(
        {"num_layers": 2, "num_heads": 1, "dropout": 0.2},
        "SASRec",
        {
            "hidden_size": 64,
            "inner_size": 64,
            "n_layers": 2,
            "n_heads": 1,
            "hidden_act": "relu",
            "hidden_dropout_prob": 0.2,
            "attn_dropout_prob": 0.0,
        },
        "ours has biases, RecBole's has none; RecBole's attention has an output projection, ours and "
        "the paper's have none; both have dropout at three places",
    ),
    "din": Pair(
        {"attention_sizes": (80, 40), "hidden_sizes": (80, 40), "dropout": 0.0},
        "DIN",
        {"embedding_size": 64, "mlp_hidden_size": [80, 40], "dropout_prob": 0.0},
        "ours has biases, RecBole's has none; RecBole's final MLP has batch normalization and SiLU, ours PReLU",
    ),
}
NOTES = [
    "Optimizers: RecBole's is torch.optim.Adam with L2 on all rows of the tables in every step. Ours is Adam whose "
    "step updates only the rows of the batch, except for lightgcn, whose graph connects all rows.",
    "Batches: ours keep the targets of a context together, so they have at most 2,048 rows on average; the number of "
    "batches per epoch is the same on both sides.",
    "Every RecBole row has the same history as ours. RecBole's SASRec does not accept an empty history: its length is "
    "set to 1, which reads the padding.",
    "Importing RecBole's sequential models turns on autograd's anomaly detection (model/sequential_recommender/"
    "sine.py), which searches every gradient for NaN. ratios has RecBole as released; "
    "ratios_without_anomaly_detection has it turned off.",
]


def start_ours(pair: Pair, name: str, data_dir: Path, threads: int, max_batches: int | None) -> SideProcess:
    """Start our trainer with one model, in a process of its own."""
    settings = {
        "model": name,
        "embedding_dim": 64,
        "history_length": HISTORY_LENGTH,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "global_batch_size": BATCH_ROWS,
        "unknown_item_share": 0.0,
        **pair.ours,
    }
    command = [sys.executable, "-m", "benchmarks.lib.cf_epoch", "--data", str(data_dir), "--threads", str(threads)]
    return SideProcess([*command, "--settings", json.dumps(settings), *_bound(max_batches)], build_environment())


def _bound(max_batches: int | None) -> list[str]:
    return [] if max_batches is None else ["--max-batches", str(max_batches)]


def start_recbole(
    python: Path, pair: Pair, rows: Path, num_rows: int, threads: int, max_batches: int | None, *, as_released: bool
) -> SideProcess:
    """Start RecBole with one model, in a process of its own."""
    settings = {
        "train_batch_size": BATCH_ROWS,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY / num_rows,
        **pair.settings,
    }
    script = ROOT / "benchmarks" / "lib" / "recbole_epoch.py"
    command = [str(python), "-W", "ignore", str(script), "--rows", str(rows), "--model", pair.recbole]
    command += ["--threads", str(threads), "--settings", json.dumps(settings), *_bound(max_batches)]
    return SideProcess(command if as_released else [*command, "--no-anomaly-detection"])


def prepare_data(data: Path, num_interactions: int | None, folder: Path) -> tuple[Path, str]:
    """Preprocess the data, unless the folder has them, and return their folder and name."""
    quiet = [f"run.dir={folder}", "monitoring.progress_bar=false"]
    if num_interactions is not None:
        logs = folder / "logs"
        if not (folder / "data").exists():
            write_synthetic_logs(logs, num_interactions)
        paths = [f"dataset.path={logs / 'interactions'}", f"dataset.items_path={logs / 'items.parquet'}"]
        length = f"preprocessing.max_history_length={HISTORY_LENGTH}"
        config, name = load_config("configs/own_ratings.yaml", [*quiet, *paths, length]), "generated logs"
    elif (data / "interactions.parquet").exists():
        paths = [f"dataset.path={data / 'interactions.parquet'}", f"dataset.items_path={data / 'items.parquet'}"]
        config, name = load_config("configs/ml1m_official.yaml", [*quiet, *paths]), data.resolve().name
    else:
        length = f"preprocessing.max_history_length={HISTORY_LENGTH}"
        config, name = load_config("configs/ml100k_demo.yaml", [*quiet, length]), "MovieLens-100K"
    run_dir = RunDir(folder)
    if not (run_dir.step_dir("data") / "manifest.json").exists():
        run_preprocess(config, run_dir)
    return run_dir.step_dir("data"), name


def write_rows(data_dir: Path, path: Path, max_rows: int | None, *, with_histories: bool) -> int:
    """Write training rows for RecBole and return their number.

    Args:
        data_dir: of the data step.
        path: of the .npz file.
        max_rows: write about so many rows, of random contexts; None = all.
        with_histories: whether the model reads histories.
    """
    manifest = load_manifest(data_dir)
    rows: Rows = load_worker_data(data_dir, manifest, splits=("train",)).splits["train"]
    contexts = torch.arange(rows.num_contexts)
    if max_rows is not None and max_rows < rows.total_rows:
        chosen = torch.randperm(rows.num_contexts, generator=torch.Generator().manual_seed(0))
        contexts = chosen[: max_rows * rows.num_contexts // rows.total_rows]
    batch, targets = rows.take(contexts, HISTORY_LENGTH if with_histories else 0)
    arrays = {
        "user_idx": batch.user_idx[batch.target_contexts],
        "item_idx": batch.item_idx,
        "label": rows.label[targets],
    }
    if with_histories:
        arrays["history"] = batch.history[batch.target_contexts].int()
    np.savez(
        path,
        **{name: values.numpy() for name, values in arrays.items()},
        history_length=HISTORY_LENGTH,
        num_users=manifest.num_users,
        num_items=manifest.num_items,
    )
    return len(targets)


def measure(
    name: str, data_dir: Path, folder: Path, python: Path, threads: int, repeats: int, max_batches: int | None
) -> dict[str, Any]:
    """Measure both sides of a model in turn."""
    pair, is_sequential = PAIRS[name], name in ("sasrec", "din")
    rows = folder / f"{name}.npz"
    max_rows = BATCH_ROWS * (max_batches + 2) if max_batches is not None and is_sequential else None
    num_rows = write_rows(data_dir, rows, max_rows, with_histories=is_sequential)
    ours = start_ours(pair, name, data_dir, threads, max_batches)
    arguments = python, pair, rows, ours.ready["rows"], threads, max_batches
    sides = {"ours": ours, "recbole": start_recbole(*arguments, as_released=True)}
    ready = sides["recbole"].ready
    if ready["rows"] != num_rows or (max_rows is None and ready["batches"] != ours.ready["batches"]):
        raise ValueError(
            f"{name}: RecBole has {ready['rows']} rows in {ready['batches']} batches, we have {ours.ready}"
        )
    if ready["anomaly_detection"]:
        sides["recbole_without_anomaly_detection"] = start_recbole(*arguments, as_released=False)
    warm = {side: process.ask("epoch") for side, process in sides.items()}
    samples: dict[str, list[Any]] = {side: [] for side in sides}
    loads, limits = [], []
    for _ in range(repeats * (SHORT_EPOCH_REPEATS if warm["recbole"]["seconds"] < SHORT_EPOCH_SECONDS else 1)):
        loads.append(round(os.getloadavg()[0], 2))
        for side, process in sides.items():
            samples[side].append(process.ask("epoch"))
        limits.append(ours.ask("limit"))
    result: dict[str, Any] = {side: summarize(values) for side, values in samples.items()}
    for side, process in sides.items():
        peak = process.ask("memory")
        result[side] |= {"peak_gib": peak, "operators": process.ask("profile"), **process.ready}
        process.close()
    limit = min(limits, key=lambda limit: limit["seconds_of_a_batch"])
    batch = result["ours"]["median_cpu"] / threads / result["ours"]["batches_of_a_sample"]
    return result | {
        "differs": pair.differs,
        "limit": {**limit, "share": limit["seconds_of_a_batch"] / batch},
        "load_average": loads,
    }


def summarize(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return median and quartiles of the seconds, the medians of their parts, and every sample."""
    seconds = [sample["seconds"] for sample in samples]
    low, middle, high = statistics.quantiles(seconds, n=4)
    parts = {name: statistics.median(sample["parts"][name] for sample in samples) for name in samples[0]["parts"]}
    return {
        "median": middle,
        "median_cpu": statistics.median(sample["cpu_seconds"] for sample in samples),
        "quartiles": [low, high],
        "smallest": min(seconds),
        "parts": parts,
        "last_loss": samples[-1]["mean_loss"],
        "batches_of_a_sample": samples[0]["batches"],
        "seconds": seconds,
        "cpu_seconds": [sample["cpu_seconds"] for sample in samples],
    }


def compute_ratios(results: dict[str, Any], side: str, number: str) -> dict[str, float]:
    """Return RecBole's time over ours by model, of the released RecBole if a model lacks the side."""
    ratios = {}
    for name, result in results.items():
        theirs = result.get(side, result["recbole"])
        ratios[name] = round(theirs[number] / result["ours"][number], 2)
    return ratios


def compute_spread(result: dict[str, Any]) -> list[float]:
    """Return quartiles of the ratio of each round, which is least sensitive to a machine whose speed drifts."""
    rounds = zip(result["recbole"]["seconds"], result["ours"]["seconds"], strict=True)
    return [round(quartile, 2) for quartile in statistics.quantiles([theirs / ours for theirs, ours in rounds], n=4)]


def describe_time(name: str, result: dict[str, Any]) -> str:
    """Describe how both sides spend their time."""
    texts = []
    for side in ("recbole", "ours"):
        median, parts = result[side]["median"], result[side]["parts"]
        shares = ", ".join(f"{part} {seconds / median:.0%}" for part, seconds in parts.items())
        operators = ", ".join(f"{entry['operator']} {entry['share']:.0%}" for entry in result[side]["operators"][:4])
        texts.append(f"{side} {median * 1e3:.0f} ms ({shares}; heaviest: {operators})")
    return f"{name}: {'; '.join(texts)}"


def main() -> None:
    """Run the benchmark and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m-collm"), help="folder of the two tables")
    parser.add_argument("--interactions", type=float, help="generate this many instead")
    parser.add_argument("--models", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1], help="torch threads; ratios are of the first")
    parser.add_argument("--repeats", type=int, default=7, help="epochs of each side; three times as many if short")
    parser.add_argument(
        "--recbole-python", type=Path, default=Path("~/.cache/collm-dist/recbole-env/bin/python").expanduser()
    )
    parser.add_argument("--max-batches", type=int, help="batches of a sample; default: an epoch")
    parser.add_argument("--keep", type=Path, help="keep the preprocessed data in this folder, or use those in it")
    parser.add_argument("--out", type=Path, default=RESULTS / "cf_throughput_cpu.json")
    arguments = parser.parse_args()
    if not arguments.recbole_python.exists():
        parser.error(f"{arguments.recbole_python} is missing: install RecBole as described in --help")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generated = int(arguments.interactions) if arguments.interactions else None
        data_dir, data_name = prepare_data(arguments.data, generated, arguments.keep or folder / "run")
        manifest = load_manifest(data_dir)
        for threads in arguments.threads:
            results[str(threads)] = {}
            for model in arguments.models:
                result = measure(model, data_dir, folder, arguments.recbole_python, threads, arguments.repeats,
                                 arguments.max_batches)  # fmt: skip
                results[str(threads)][model] = result
                medians = {side: round(result[side]["median"], 4) for side in result if "median" in result[side]}
                share = result["limit"]["share"]
                print(f"{threads} threads, {model}: {medians}, {share:.0%} of the limit", flush=True)
    first = results[str(arguments.threads[0])]
    faster = "recbole_without_anomaly_detection"
    record = {
        "question": __doc__.splitlines()[0],
        "ratios": compute_ratios(first, "recbole", "median"),
        "ratios_without_anomaly_detection": compute_ratios(first, faster, "median"),
        "ratios_by_threads": {
            threads: {
                "median": compute_ratios(result, "recbole", "median"),
                "smallest": compute_ratios(result, "recbole", "smallest"),
                "median_cpu": compute_ratios(result, "recbole", "median_cpu"),
                "median_cpu_without_anomaly_detection": compute_ratios(result, faster, "median_cpu"),
                "median_without_anomaly_detection": compute_ratios(result, faster, "median"),
                "smallest_without_anomaly_detection": compute_ratios(result, faster, "smallest"),
            }
            for threads, result in results.items()
        },
        "share_of_limit": {
            threads: {model: round(entry["limit"]["share"], 2) for model, entry in result.items()}
            for threads, result in results.items()
        },
        "ratio_quartiles": {model: compute_spread(result) for model, result in first.items()},
        "notes": [*NOTES, *(describe_time(model, result) for model, result in first.items())],
        "config": {"data": data_name, "users": manifest.num_users, "items": manifest.num_items,
                   "rows": manifest.splits["train"].rows, "embedding_dim": 64, "history_length": HISTORY_LENGTH,
                   "batch_rows": BATCH_ROWS, "threads": arguments.threads, "max_batches": arguments.max_batches},
        **describe_run("numpy", "torch"),
        "results": results,
    }  # fmt: skip
    write_json(arguments.out, record)
    print(json.dumps(record["ratios_by_threads"], indent=1))


if __name__ == "__main__":
    main()
