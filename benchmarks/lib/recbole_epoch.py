"""RecBole's side of benchmarks/cf_throughput.py: train one epoch per line on standard input.

RecBole needs older libraries, so this runs in an environment of its own and imports only epoch_timing.py from here:

    python3.11 -m venv ~/.cache/collm-dist/recbole-env && ~/.cache/collm-dist/recbole-env/bin/pip install \
        recbole==1.2.1 torch==2.13.0 numpy==1.26.4 pandas==2.2.3 scipy==1.11.4 "setuptools<81"

The rows are an .npz file: user_idx, item_idx, label (N,), history (N, H) padded with -1 for the sequential models,
history_length, num_users, num_items. They are written as RecBole's own files, with finished sequences, and read by
RecBole's Dataset. Training is RecBole's ``Trainer._train_epoch`` with RecBole's loader, model and optimizer.

The line ``epoch`` trains an epoch and answers with its seconds; ``profile`` trains an epoch under the profiler and
answers with the heaviest operators; ``memory`` answers with the peak since the start of training, in GiB.

RecBole trains LightGCN on pairs and SASRec with a softmax over all items. Here both keep their forward pass, and the
loss is that of FM and DIN: binary cross-entropy of each row's label.

Importing any of RecBole's sequential models imports SINE, whose module turns on autograd's anomaly detection for the
whole process: every gradient is searched for NaN. ``--no-anomaly-detection`` turns it off again, to measure its cost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from epoch_timing import TimedBatches, TimedCall, list_operators, read_peak_memory, reset_peak_memory
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.utils import get_dataloader
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed
from torch.nn import functional

SEQUENTIAL = ("SASRec", "DIN")
DATASET = "rows"
LIBRARIES = ("recbole", "torch", "numpy", "pandas", "scipy")


def write_atomic_files(rows: Any, folder: Path, *, with_histories: bool) -> None:
    """Write the rows as RecBole's files.

    A second file names every user and item, so that RecBole's tables are as large as ours.
    """
    (folder / DATASET).mkdir()
    users, items = int(rows["num_users"]), int(rows["num_items"])
    count = max(users, items)
    histories = rows["history"] if with_histories else [()] * len(rows["label"])
    parts = {
        "train": zip(rows["user_idx"], rows["item_idx"], rows["label"], histories, strict=True),
        "tables": zip(np.arange(count) % users, np.arange(count) % items, [0] * count, [[0]] * count, strict=True),
    }
    for name, part in parts.items():
        with (folder / DATASET / f"{DATASET}.{name}.inter").open("w", encoding="utf-8") as file:
            file.write("user_id:token\titem_id:token\tlabel:float\titem_id_list:token_seq\n")
            for user, item, label, history in part:
                sequence = " ".join(str(item) for item in history if item >= 0)
                file.write(f"{user}\t{item}\t{float(label)}\t{sequence}\n")


def build_config(model: str, folder: Path, settings: dict[str, Any], history_length: int) -> Any:
    """Return RecBole's config; all other settings keep RecBole's defaults."""
    columns = ["user_id", "item_id", "label"]
    sequential = model in SEQUENTIAL
    values = {
        "data_path": str(folder),
        "checkpoint_dir": str(folder),
        "benchmark_filename": ["train", "tables"],
        "load_col": {"inter": [*columns, "item_id_list"] if sequential else columns},
        "alias_of_item_id": ["item_id_list"] if sequential else None,
        "MAX_ITEM_LIST_LENGTH": history_length,
        "train_neg_sample_args": None,
        "eval_args": {"order": "TO", "mode": "labeled", "split": None, "group_by": None},
        "repeatable": sequential,
        "metrics": ["AUC"],
        "valid_metric": "AUC",
        "use_gpu": False,
        "show_progress": False,
        "seed": 0,
        **settings,
    }
    # RecBole would read this process's arguments as settings.
    sys.argv = sys.argv[:1]
    return Config(model=model, dataset=DATASET, config_dict=values)


def build_trainer(model_name: str, config: Any) -> tuple[Any, Any, Any]:
    """Return RecBole's trainer, its loader of the training rows, and the loss function."""
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config).build()[0]
    if model_name == "SASRec":
        # SASRec reads the vector at the last position of the sequence; for an empty history, the padding at the first.
        dataset.inter_feat["item_length"].clamp_(min=1)
    model = get_model(model_name)(config, dataset)
    loader = get_dataloader(config, "train")(config, dataset, None, shuffle=True)
    return Trainer(config, model), loader, _choose_loss(model_name, model)


def _choose_loss(model_name: str, model: Any) -> Callable[[Any], torch.Tensor]:
    def compute_graph_loss(batch: Any) -> torch.Tensor:
        users, items = model()
        logits = (users[batch["user_id"]] * items[batch["item_id"]]).sum(dim=1)
        return functional.binary_cross_entropy_with_logits(logits, batch["label"])

    def compute_sequence_loss(batch: Any) -> torch.Tensor:
        vectors = model(batch["item_id_list"], batch["item_length"])
        logits = (vectors * model.item_embedding(batch["item_id"])).sum(dim=1)
        return functional.binary_cross_entropy_with_logits(logits, batch["label"])

    default: Callable[[Any], torch.Tensor] = model.calculate_loss
    return {"LightGCN": compute_graph_loss, "SASRec": compute_sequence_loss}.get(model_name, default)


def train_epoch(
    trainer: Any, loader: Any, loss: Callable[[Any], torch.Tensor], epoch: int, max_batches: int | None
) -> dict[str, Any]:
    """Train one epoch, or the counted batches, and return the seconds, in all and by part."""
    forward, step = TimedCall(loss), TimedCall(trainer.optimizer.step)
    timed = TimedBatches(loader, max_batches, [forward, step])
    trainer.optimizer.step = step
    total = trainer._train_epoch(timed, epoch, loss_func=forward)
    measured = timed.measure()
    trainer.optimizer.step = step.function
    parts = {"load": timed.loading, "forward": forward.seconds, "optimizer": step.seconds}
    parts["backward_and_rest"] = measured["seconds"] - sum(parts.values())
    return {**measured, "mean_loss": total / len(loader), "parts": parts}


def main() -> None:
    """Answer each line of standard input with a line of JSON; the first line of output means ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help=".npz file of the training rows")
    parser.add_argument("--model", required=True, choices=["FM", "LightGCN", *SEQUENTIAL])
    parser.add_argument("--settings", type=json.loads, default={}, help="RecBole settings as JSON")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--max-batches", type=int, help="batches of a sample; default: the epoch")
    parser.add_argument(
        "--no-anomaly-detection", action="store_true", help="turn off the anomaly detection that RecBole turned on"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = np.load(arguments.rows)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # RecBole logs into the current folder
        write_atomic_files(rows, Path(folder), with_histories=arguments.model in SEQUENTIAL)
        config = build_config(arguments.model, Path(folder), arguments.settings, int(rows["history_length"]))
        trainer, loader, loss = build_trainer(arguments.model, config)
        if arguments.no_anomaly_detection:
            torch.autograd.set_detect_anomaly(False)
        ready = {
            "rows": len(loader._dataset),
            "batches": len(loader),
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "anomaly_detection": torch.is_anomaly_enabled(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        }
        print(json.dumps(ready), flush=True)
        reset_peak_memory()
        for number, line in enumerate(sys.stdin):
            train = partial(train_epoch, trainer, loader, loss, number, arguments.max_batches)
            requests = {"epoch": train, "profile": lambda: list_operators(train), "memory": read_peak_memory}  # noqa: B023
            print(json.dumps(requests[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()
