"""Sections of docs/results.md that need no language model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collm_dist.evaluation.report_markdown import render_table

_LEAK_FILE = "cross_fit_ml1m.json"
_TABLES_FILE = "tuned_tables_ml1m.json"
_TITLES_FILE = "title_tuning_ml1m.json"
_MODES = {
    "frozen": "frozen after the CF step (the paper's recipe)",
    "T1": "trained further (T1)",
    "T2": "trained from scratch (T2)",
}
_MODELS = {"mf": "MF", "lightgcn": "LightGCN", "sasrec": "SASRec", "din": "DIN"}
_KINDS = {"vectors": "user and item vector", "statistics": "pair slot only", "both": "both"}


def render_leak(results: Path) -> list[str]:
    """Return the table of the cost of the leak on all training rows, from benchmarks/cross_fit_leak.py."""
    path = results / _LEAK_FILE
    if not path.exists():
        return []
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    cells = []
    for kind, name in _KINDS.items():
        for folds in sorted(runs, key=int)[: 1 if kind == "statistics" else None]:  # statistics do not depend on folds
            metrics = runs[folds][kind]
            shown = _show_spread(metrics, ("train", "test", "test_uauc"))
            label = name if kind == "statistics" else f"{name}, {_name_folds(folds)}"
            cells.append([label, *shown, f"{metrics['gap']:+.3f}"])
    return [
        "The cost of the leak itself, without a language model and on all training rows: an MLP on the slot inputs, "
        f"mean over seeds (`benchmarks/results/{_LEAK_FILE}`). If the CF model was fitted to the rows that the MLP "
        "learns from (`cf.cross_fit: off`, the paper's way), the slots look far better on training rows than they are "
        "on test rows.",
        "",
        render_table(["slots, folds", "AUC on train", "AUC on test", "UAUC on test", "train minus test"], cells),
        "",
    ]


def render_tables(results: Path) -> list[str]:
    """Return the table of the ways to train the slots' tables, from benchmarks/tuned_tables.py."""
    path = results / _TABLES_FILE
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    cells = []
    for name in sorted(record["runs"], key=_order_mode):
        metrics, (model, _, mode) = record["runs"][name], name.partition(" ")
        label = f"{_MODELS[model]}, {_MODES[mode]}" if mode in _MODES else "id tokens, no CF model"
        cells.append([label, *_show_spread(metrics, ("train", "valid", "test", "test_uauc"))])
    return [
        "The gain from training the tables, without a language model and on all training rows: an MLP in place of the "
        f"language model reads user and item vector, mean over {record['seeds']} seeds "
        f"(`benchmarks/results/{_TABLES_FILE}`).",
        "",
        render_table(["tables", "AUC on train", "AUC on valid", "AUC on test", "UAUC on test"], cells),
        "",
    ]


def render_title_tuning(results: Path) -> list[str]:
    """Return the section on ways of tuning a small language model on titles, from benchmarks/title_tuning.py."""
    path = results / _TITLES_FILE
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    cells = []
    for way in record["ways"]:
        half, end = way["history"]
        values = [f"{point[metric]:.3f}" for metric in ("auc", "uauc", "logloss") for point in (half, end)]
        cells.append([way["name"], _name_way(way["settings"]), *values])
    heads = [f"{metric}, {time}" for metric in ("AUC", "UAUC", "log-loss") for time in ("half time", "end")]
    steps, items = (record["ways"][0]["settings"][key] for key in ("steps", "items_per_step"))
    return [
        "## Ways of tuning a small language model",
        "",
        "What a language model learns about items from their titles alone, on all validation rows of MovieLens-1M "
        f"(`benchmarks/results/{_TITLES_FILE}`). Each of {steps} steps reads {items} titles, each with the share of "
        "likes of all its training rows; one seed, one thread.",
        "",
        render_table(["way", "trained weights, learning rate", *heads], cells),
        "",
    ]


def _name_way(settings: Mapping[str, Any]) -> str:
    layers = "all linear layers" if len(settings["layers"]) > 2 else "q and v"
    trained = f"LoRA of rank {settings['rank']} on {layers}" if settings["rank"] else "all weights of the layers"
    return f"{trained}, {settings['learning_rate']:g}"


def _order_mode(name: str) -> tuple[bool, str, int]:
    """Return a sort key: by model, the paper's way first; id tokens last."""
    model, _, mode = name.partition(" ")
    return mode not in _MODES, model, list(_MODES).index(mode) if mode in _MODES else 0


def _show_spread(metrics: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [f"{metrics[key]['mean']:.4f} ± {metrics[key]['std']:.4f}" for key in keys]


def _name_folds(folds: str) -> str:
    return "a CF model of all rows (off)" if folds == "0" else f"{folds} folds"
