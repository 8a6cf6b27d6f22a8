"""Records of a finished run: data, weights, curves, batches, scores, report and rankings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy
import torch

import collm_dist
from collm_dist.config.loader import load_config
from collm_dist.data.prompts.slot_codes import Masking
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.orchestration.pretrain import run_pretrain
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.run_stage import build_orders
from collm_dist.tuning.stage import get_stage, load_stage_model
from collm_dist.tuning.step_batches import iter_step_batches
from tests.golden.commands import list_places, replace_paths
from tests.golden.records import describe_array

# So few that a global batch is divided.
MICRO_BATCH_TOKENS = 700
STAGES = ("stage1", "stage2")
CF_MODELS = {
    "sasrec": ["cf.model=sasrec", "cf.history_length=5"],
    "lightgcn": ["cf.model=lightgcn", "cf.feedback=all"],
    "two_workers": ["cf.num_workers=2", "cf.num_epochs=2"],
}
# Of a summary: what differs from one time to the next, and what is recorded elsewhere or depends on folders.
TIMED = ("throughput", "memory", "fingerprint", "files", "record_hash")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def collect_run(run: Path) -> dict[str, Any]:
    """Return all that is recorded of a finished run, with placeholders for its folders."""
    found = {
        "data": collect_data(run),
        "cf": collect_cf(run),
        **{stage: collect_stage(run, stage) for stage in STAGES},
        "batches": {stage: collect_batches(run, stage) for stage in STAGES},
        "eval": collect_evaluation(run),
        "rank": collect_rankings(run),
    }
    return replace_paths(found, list_places(run))


def collect_data(run: Path) -> dict[str, Any]:
    """Return the manifest, without what it was made from, and the tables' columns."""
    manifest = read_json(run / "data" / "manifest.json")
    kept = {key: value for key, value in manifest.items() if key not in ("fingerprint", "record_hash")}
    for key in ("shards", "buckets"):
        kept[key] = [
            {("file_sha256" if name == "sha256" else name): record[name] for name in record} for record in kept[key]
        ]
    kept["tables"] = {name: {"file_sha256": value} for name, value in kept["tables"].items()}
    tables = sorted((run / "data").glob("**/*.parquet"))
    return {
        "manifest": kept,
        "columns": {str(path.relative_to(run / "data")): _describe_columns(path) for path in tables},
        "item_tokens": {path.name: describe_array(np.load(path)) for path in sorted((run / "item_tokens").iterdir())},
    }


def _describe_columns(path: Path) -> dict[str, Any]:
    described = {}
    table = pq.read_table(path)
    for name in table.column_names:
        values = table[name].to_pylist()
        text = json.dumps(values, ensure_ascii=False)
        described[name] = f"{table.schema.field(name).type} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return {"rows": table.num_rows, "columns": described}


def collect_cf(run: Path) -> dict[str, Any]:
    """Return the collaborative model's weights and figures."""
    files = sorted((run / "cf").glob("*.safetensors"))
    return {
        "weights": {path.name: describe_tensors(path) for path in files},
        "summary": _leave_out(read_json(run / "cf" / "summary.json"), TIMED),
        "curve": read_curve(run / "cf" / "metrics.jsonl"),
    }


def fit_cf_models(run: Path, folder: Path) -> dict[str, Any]:
    """Return what becomes of the collaborative models that no finished run has, fitted to a run's data.

    Args:
        run: a finished one.
        folder: an empty one.
    """
    found = {}
    with connect_ray(load_config(run / "config.yaml").cluster):
        for name, overrides in CF_MODELS.items():
            config = load_config(run / "config.yaml", ["cf.cross_fit=off", *overrides])
            shutil.copytree(run / "data", folder / name / "data")
            run_pretrain(config, RunDir(folder / name))
            found[name] = {"settings": overrides, **collect_cf(folder / name)}
    return found


def describe_tensors(path: Path) -> dict[str, Any]:
    """Return each tensor of a safetensors file."""
    return {name: describe_array(value) for name, value in sorted(safetensors.numpy.load_file(path).items())}


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Return the points of a metrics.jsonl without those of time and memory."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        {key: value for key, value in line.items() if key.split("/")[0] not in ("speed", "memory")} for line in lines
    ]


def _leave_out(record: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in names}


def collect_stage(run: Path, stage: str) -> dict[str, Any]:
    """Return a stage's curve, summary and product."""
    folder = run / stage
    checkpoints = sorted((folder / "checkpoints").iterdir())
    products = ("adapter/adapter_model", "merged/model") if stage == "stage1" else ("mapping",)
    return {
        "curve": read_curve(folder / "metrics.jsonl"),
        "summary": _leave_out(read_json(folder / "summary.json"), TIMED),
        "deepspeed_config": read_json(folder / "deepspeed_config.json"),
        "weights": {name: describe_tensors(folder / f"{name}.safetensors") for name in products},
        "checkpoints": [path.name for path in checkpoints],
        "last_checkpoint": _describe_checkpoint(checkpoints[-1]),
    }


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(str(path), framework="np") as file:
        header = file.metadata()
    return {
        "header": sorted(header),
        "progress": json.loads(header["progress"]),
        "adam_steps": header["adam_steps"],
        "tensors": describe_tensors(path),
    }


def collect_batches(run: Path, stage: str) -> dict[str, Any]:
    """Return every array of a stage's first two micro-batches in training, the second epoch's first, and one that is
    only scored."""
    config, run_dir = load_config(run / "config.yaml"), RunDir(run)
    loaded = load_stage_model(config, run_dir, stage, torch.device("cpu"))
    train, valid = build_orders(config, run_dir, get_stage(config, stage).settings)

    def take(order: Any, collator: Any, epoch: int, count: int) -> list[Any]:
        masking = Masking(0.3, config.run.seed, epoch) if collator is loaded.collator and stage == "stage2" else None
        blocks = order.iter_batches(epoch)
        found = islice(iter_step_batches(blocks, collator, MICRO_BATCH_TOKENS, torch.device("cpu"), masking), 2)
        return [describe_batch(micro_batch) for prepared in found for micro_batch in prepared.micro_batches][:count]

    return {
        "first": take(train, loaded.collator, 0, 2),
        "second_epoch": take(train, loaded.collator, 1, 1),
        "scored": take(valid, loaded.scoring_collator, 0, 1),
    }


def describe_batch(batch: Any) -> dict[str, Any]:
    """Return every array and number of a (nested) dataclass."""
    described: dict[str, Any] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if dataclasses.is_dataclass(value):
            described |= {f"{field.name}.{name}": part for name, part in describe_batch(value).items()}
        else:
            described[field.name] = value if isinstance(value, int) else describe_array(value)
    return described


def collect_evaluation(run: Path) -> dict[str, Any]:
    """Return the report's figures and texts, and the scores of every model."""
    report = read_json(run / "eval" / "report.json")
    scores = {}
    for path in sorted((run / "eval" / "scores").iterdir()):
        table = pq.read_table(path)
        rows = np.stack([table[name].to_numpy() for name in ("row_id", "user_idx", "item_idx", "label")])
        scores[path.name] = {"rows": describe_array(rows), "score": describe_array(table["score"].to_numpy(), 8)}
    # The report's hash is left out: it is also of the backbone's path, which is another one each time.
    return {"report": _leave_out(report, ("fingerprint", "content_hash", "files", "record_hash")), "scores": scores}


def collect_rankings(run: Path) -> dict[str, Any]:
    """Return what is ranked for a known user, for unknown ones, and at an earlier time."""
    recommender = collm_dist.load_recommender(run, device="cpu")
    items, users = recommender.item_ids, recommender.user_ids
    middle = read_json(run / "data" / "manifest.json")["splits"]["valid"]["first_timestamp"]
    queries = {
        "known": {"user": users[3], "num_retrieved": 6},
        "known_candidates": {"user": users[1], "candidates": items[:7], "top_k": 5},
        "known_before": {"user": users[2], "candidates": items[2:8], "as_of": middle},
        "unknown": {"user": "nobody", "num_retrieved": 4},
        "unknown_history": {"user": "nobody", "history": items[1:4], "candidates": items[4:9]},
    }
    return {
        name: {"query": query, "items": [dataclasses.asdict(item) for item in recommender.rank(**query)]}
        for name, query in queries.items()
    }
