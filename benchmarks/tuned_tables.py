"""What do tables bring that stage 2 trains too, beside those of a frozen collaborative model? Without a language model.

    python -m benchmarks.tuned_tables --data DIR [--config configs/ml1m_official.yaml] [--models mf] [--seeds 3]

A small network takes the place of the language model: it reads user vector, item vector and their product, and learns
from all training rows, by the loss, optimizer and learning rate of stage 2. The tables are frozen as the CF step left
them (the paper's recipe), trained on (stage2.train_cf: true, T1), trained from scratch (T2), or id tokens without a CF
model (cf.model: none). The epoch that is best on valid counts. DIR holds interactions.parquet and items.parquet. Writes
tuned_tables_ml1m.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cross_fit_leak import load_blocks
from benchmarks.lib.machine import describe_hardware
from collm_dist.cf.model_files import load_cf_model
from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.cf.stage2_init import load_for_tuning
from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.evaluation.slot_inputs import pad_histories
from collm_dist.metrics import compute_auc, compute_uauc
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.preprocess import run_preprocess
from collm_dist.orchestration.pretrain import run_pretrain
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("frozen", "T1", "T2")
HIDDEN, DROPOUT, BATCH_ROWS, MAX_EPOCHS, PATIENCE = 64, 0.1, 256, 30, 5


@dataclass(frozen=True)
class Rows:
    """The rows of a split: (N,) users, items, labels and times, (N, H) histories."""

    users: Tensor
    items: Tensor
    histories: Tensor
    times: Tensor
    labels: Tensor

    @classmethod
    def from_block(cls, block: ContextBlock, history_length: int) -> Rows:
        """Take the rows of a block in its order."""
        contexts = block.target_contexts
        arrays = (block.user_idx[contexts], block.item_idx, pad_histories(block, history_length)[contexts],
                  block.timestamp, block.label)  # fmt: skip
        return cls(*(torch.from_numpy(np.ascontiguousarray(one)) for one in arrays))

    def __len__(self) -> int:
        """N."""
        return len(self.labels)


class Reader(nn.Module):
    """Tables, and the network in the language model's place."""

    def __init__(self, vectors: SlotVectors) -> None:
        """Make the network for the vectors' width."""
        super().__init__()
        self.vectors = vectors
        width = 3 * vectors.embedding_dim
        self.layers = nn.Sequential(
            nn.Linear(width, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, 1)
        )  # fmt: skip

    def forward(self, rows: Rows, chosen: Tensor) -> Tensor:
        """Return the logits of the chosen rows."""
        items, times = rows.items[chosen], rows.times[chosen]
        user = self.vectors.user_vectors(rows.users[chosen], rows.histories[chosen], items, times)
        item = self.vectors.item_vectors(items, times)
        logits: Tensor = self.layers(torch.cat([user, item, user * item], dim=1)).squeeze(1)
        return logits

    @torch.no_grad()
    def score(self, rows: Rows) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the logits of all rows, without dropout."""
        self.eval()
        parts = [self(rows, part) for part in torch.arange(len(rows)).split(4096)]
        return np.asarray(torch.cat(parts).double().numpy())


def fit(vectors: SlotVectors, rows: dict[str, Rows], config: Config, seed: int) -> Reader:
    """Train network and tables (where they require gradients) and return them as they were best on valid."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = Reader(vectors)
        trained = [one for one in reader.parameters() if one.requires_grad]
        stage = config.stage2
        optimizer = torch.optim.AdamW(
            trained, lr=stage.learning_rate, weight_decay=stage.weight_decay, betas=stage.adam_betas
        )
        best, best_epoch, best_state = 0.0, 0, copy.deepcopy(reader.state_dict())
        for epoch in range(MAX_EPOCHS):
            reader.train()
            for chosen in torch.randperm(len(rows["train"])).split(BATCH_ROWS):
                labels = rows["train"].labels[chosen].float()
                loss = functional.binary_cross_entropy_with_logits(reader(rows["train"], chosen), labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            auc = compute_auc(rows["valid"].labels.numpy(), reader.score(rows["valid"])) or 0.0
            if auc > best:
                best, best_epoch, best_state = auc, epoch, copy.deepcopy(reader.state_dict())
            elif epoch - best_epoch >= PATIENCE:
                break
    reader.load_state_dict(best_state)
    return reader


def measure(config: Config, run_dir: RunDir, way: str, seeds: int) -> dict[str, Any]:
    """Fit one way's network for several seeds; return mean and spread of AUC by split and of the test's UAUC."""
    manifest = load_manifest(run_dir.step_dir("data"))
    blocks = load_blocks(config, run_dir)
    rows = {split: Rows.from_block(block, manifest.max_history_length) for split, block in blocks.items()}
    values: dict[str, list[float]] = {name: [] for name in (*rows, "test_uauc")}
    for seed in range(seeds):
        if way == "frozen":
            vectors = load_cf_model(run_dir, manifest)
        else:
            vectors = load_for_tuning(
                run_dir, manifest, from_scratch=way != "T1", init_scale=config.cf.init_scale, seed=seed
            )
        reader = fit(vectors, rows, config, seed)
        scores = {split: reader.score(part) for split, part in rows.items()}
        for split, part in rows.items():
            values[split].append(compute_auc(part.labels.numpy(), scores[split]) or 0.5)
        test = rows["test"]
        values["test_uauc"].append(compute_uauc(test.labels.numpy(), scores["test"], test.users.numpy())[0] or 0.5)
    return {
        name: {"mean": float(np.mean(many)), "std": float(np.std(many, ddof=1)) if seeds > 1 else 0.0}
        for name, many in values.items()
    }


def main() -> None:
    """Measure each model and way on the same rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with interactions.parquet and items.parquet")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ml1m_official.yaml")
    parser.add_argument("--models", nargs="+", default=["mf"], help="values of cf.model that stage 2 can train")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    arguments = parser.parse_args()
    data, runs = arguments.data.resolve(), {}
    with tempfile.TemporaryDirectory() as folder:
        for model in [*arguments.models, "none"]:
            own = ["cf.model=none", "stage2.train_cf=scratch"] if model == "none" else [f"cf.model={model}"]
            config = load_config(
                arguments.config,
                [f"run.dir={folder}", f"dataset.path={data / 'interactions.parquet'}",
                 f"dataset.items_path={data / 'items.parquet'}", "monitoring.progress_bar=false", *own,
                 *arguments.overrides],
            )  # fmt: skip
            run_dir = RunDir(Path(folder))
            with connect_ray(config.cluster):
                run_preprocess(config, run_dir)
                run_pretrain(config, run_dir, force=True)
            for way in ("T2",) if model == "none" else WAYS:
                found = measure(config, run_dir, way, arguments.seeds)
                name = "id tokens" if model == "none" else f"{model} {way}"
                runs[name] = found
                print(f"{name:10} " + "  ".join(f"{key} {one['mean']:.4f}" for key, one in found.items()), flush=True)
    record = {
        "question": __doc__.splitlines()[0],
        "runs": runs,
        "config": {name: getattr(config, name).model_dump(mode="json") for name in ("cf", "stage2")},
        "seeds": arguments.seeds,
        "hardware": describe_hardware(),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "ray", "numpy")},
    }
    write_json(arguments.output / "tuned_tables_ml1m.json", record)


if __name__ == "__main__":
    main()
