"""How much does it help to train the CF model's tables in stage 2 too?

    python -m benchmarks.tuned_tables --data DIR [--config configs/ml1m_official.yaml] [--models mf] [--seeds 3]

An MLP replaces the language model: it reads user vector, item vector and their product, and learns from all training
rows with the loss, optimizer and learning rate of stage 2. The tables are frozen after the CF step (the paper's
recipe), trained further (stage2.train_cf: true, T1), trained from scratch (T2), or id tokens without a CF model
(cf.model: none). The epoch with the best AUC on valid counts. DIR holds interactions.parquet and items.parquet. Writes
tuned_tables_ml1m.json.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cross_fit_leak import load_blocks
from benchmarks.lib.machine import RESULTS, ROOT, describe_run
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

MODES = ("frozen", "T1", "T2")
HIDDEN, DROPOUT, BATCH_ROWS, MAX_EPOCHS, PATIENCE = 64, 0.1, 256, 30, 5


@dataclass(frozen=True)
class Rows:
    """Rows of a split: (N,) users, items, labels and times, (N, H) histories."""

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
        return cls(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)


class Reader(nn.Module):
    """Tables, and the MLP that replaces the language model."""

    def __init__(self, vectors: SlotVectors) -> None:
        """Build the MLP for the width of the vectors."""
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
    """Train the MLP, and tables that require gradients; return the state of the best epoch on valid."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = Reader(vectors)
        trained = [parameter for parameter in reader.parameters() if parameter.requires_grad]
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


def measure(config: Config, run_dir: RunDir, mode: str, seeds: int) -> dict[str, Any]:
    """Fit the MLP for several seeds; return mean and spread of AUC by split and of the test UAUC."""
    manifest = load_manifest(run_dir.step_dir("data"))
    blocks = load_blocks(config, run_dir)
    rows = {split: Rows.from_block(block, manifest.max_history_length) for split, block in blocks.items()}
    values: dict[str, list[float]] = {name: [] for name in (*rows, "test_uauc")}
    for seed in range(seeds):
        if mode == "frozen":
            vectors = load_cf_model(run_dir, manifest)
        else:
            vectors = load_for_tuning(
                run_dir, manifest, from_scratch=mode != "T1", init_scale=config.cf.init_scale, seed=seed
            )
        reader = fit(vectors, rows, config, seed)
        scores = {split: reader.score(part) for split, part in rows.items()}
        for split, part in rows.items():
            values[split].append(compute_auc(part.labels.numpy(), scores[split]) or 0.5)
        test = rows["test"]
        values["test_uauc"].append(compute_uauc(test.labels.numpy(), scores["test"], test.users.numpy())[0] or 0.5)
    return {
        name: {"mean": float(np.mean(scores)), "std": float(np.std(scores, ddof=1)) if seeds > 1 else 0.0}
        for name, scores in values.items()
    }


def main() -> None:
    """Measure each model and mode on the same rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with interactions.parquet and items.parquet")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ml1m_official.yaml")
    parser.add_argument("--models", nargs="+", default=["mf"], help="values of cf.model that stage 2 can train")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    data, runs = arguments.data.resolve(), {}
    with tempfile.TemporaryDirectory() as folder:
        for model in [*arguments.models, "none"]:
            settings = ["cf.model=none", "stage2.train_cf=scratch"] if model == "none" else [f"cf.model={model}"]
            config = load_config(
                arguments.config,
                [f"run.dir={folder}", f"dataset.path={data / 'interactions.parquet'}",
                 f"dataset.items_path={data / 'items.parquet'}", "monitoring.progress_bar=false", *settings,
                 *arguments.overrides],
            )  # fmt: skip
            run_dir = RunDir(Path(folder))
            with connect_ray(config.cluster):
                run_preprocess(config, run_dir)
                run_pretrain(config, run_dir, force=True)
            for mode in ("T2",) if model == "none" else MODES:
                metrics = measure(config, run_dir, mode, arguments.seeds)
                name = "id tokens" if model == "none" else f"{model} {mode}"
                runs[name] = metrics
                shown = "  ".join(f"{key} {value['mean']:.4f}" for key, value in metrics.items())
                print(f"{name:10} {shown}", flush=True)
    record = {
        "question": __doc__.splitlines()[0],
        "runs": runs,
        "config": {name: getattr(config, name).model_dump(mode="json") for name in ("cf", "stage2")},
        "seeds": arguments.seeds,
        **describe_run("torch", "ray", "numpy"),
    }
    write_json(arguments.output / "tuned_tables_ml1m.json", record)


if __name__ == "__main__":
    main()
