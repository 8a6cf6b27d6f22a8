"""Row of a run in TensorBoard's HParams table: main settings and final metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collm_dist.config import Config
from collm_dist.evaluation.report_markdown import list_metrics
from collm_dist.monitoring import RunSettings
from collm_dist.runs.fingerprints import flatten_config
from collm_dist.runs.local_paths import shorten_path

SETTINGS = (
    "run.seed",
    "cf.model",
    "cf.embedding_dim",
    "cf.cross_fit",
    "cf.feedback",
    "prompt.stage1",
    "prompt.stage2",
    "prompt.history_length",
    "llm.backbone",
    "llm.quantization",
    "lora.rank",
    "lora.alpha",
    "mapping.hidden_multiple",
    "mapping.tokens_per_slot",
    "stage1.enabled",
    "stage2.train_cf",
    *(
        f"{stage}.{name}"
        for stage in ("stage1", "stage2")
        for name in ("learning_rate", "global_batch_size", "num_epochs", "max_steps", "max_train_contexts")
    ),
)
_MODELS = ("cf", "stage1", "stage2")
_MAX_TEXT = 60


def build_run_settings(config: Config, report: Mapping[str, Any]) -> RunSettings:
    """Return the row of a run.

    Args:
        config: the experiment.
        report: contents of its report.json.
    """
    flat = flatten_config(config)
    rows = [row for row in report["rows"] if row["slice"] == "all" and row["split"] != "train"]
    names = [name for name in list_metrics(rows) if not name.startswith("hr")] + ["logloss"]
    metrics = {
        f"final/{row['model']}_{row['split']}_{name.replace('@', '-at-')}": row[name]
        for row in rows
        for name in names
        if row["model"] in _MODELS and row.get(name) is not None
    }
    settings = {"dataset": report["data"]["name"], **{name: flat[name] for name in SETTINGS}}
    return RunSettings(shorten_path(config.run.dir), {name: _show(value) for name, value in settings.items()}, metrics)


def _show(value: Any) -> float | bool | str:
    return value if isinstance(value, int | float) else " ".join(shorten_path(str(value)).split())[:_MAX_TEXT]
