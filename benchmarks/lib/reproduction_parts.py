"""The section "What each part brings" of docs/results.md: the evidence for each part of the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.reproduction_names import CF_NAMES, VARIANT_NAMES, name_cell
from collm_dist.evaluation.report_markdown import format_number, render_table

# The part of a variant that its base lacks.
_PARTS = {
    "pair": "pair slot: as-of statistics of user and item",
    "pair_cross_fit": "cross-fitting: slots that have not seen the row's label",
    "pair_all": "CF model that reads all feedback",
    "train_cf": "CF model trained further in stage 2 (T1)",
    "scratch": "CF model trained in stage 2 only (T2)",
    "ui_tokens": "id tokens in place of a CF model",
    "item_ids": "a slot for each item of the history",
    "pair_ask_first": "a prompt with the question first",
}
_LEAK_FILE = "cross_fit_ml1m.json"
_TABLES_FILE = "tuned_tables_ml1m.json"
_MODES = {
    "frozen": "frozen after the CF step (the paper's recipe)",
    "T1": "trained further (T1)",
    "T2": "trained from scratch (T2)",
}
_KINDS = {"vectors": "user and item vector", "statistics": "pair slot only", "both": "both"}


def judge(row: Mapping[str, Any], metric: str) -> str:
    """Return the verdict of a difference's interval: better, worse or cannot be told."""
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    if low is None or high is None:
        return "not defined"
    return "better" if low > 0 else "worse" if high < 0 else "cannot be told"


def render_parts(against: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of stage 2 with a part minus stage 2 without it, on the same test rows."""
    if not against:
        return []
    cells = []
    for row in against:
        cf, variant = str(row["versus"]).split("/")
        cells.append(
            [
                f"{CF_NAMES[row['cf']]}: {_PARTS[row['variant']]}",
                f"{CF_NAMES[cf]}, {VARIANT_NAMES[variant]}",
                format_number(row, "auc", signed=True),
                judge(row, "auc"),
                format_number(row, "uauc", signed=True),
                judge(row, "uauc"),
            ]
        )
    return [
        "Stage 2 with a part minus stage 2 without it, paired on the same test rows:",
        "",
        render_table(["part", "compared with", "AUC", "verdict", "UAUC", "verdict"], cells),
        "",
    ]


def render_llm_share(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return, for each cell, whether the language model adds to its slots."""
    compared = [row for row in differences if (row["model"], row["versus"]) == ("stage2", "slots_without_llm")]
    verdicts = {
        "better": "the language model adds to its slots",
        "worse": "**the language model takes away from its slots**",
        "cannot be told": "**no gain from the language model can be seen**",
        "not defined": "not defined",
    }
    lines = [
        f"- {name_cell(row)}: {verdicts[judge(row, 'auc')]} (AUC {format_number(row, 'auc', signed=True)} against the "
        "slots without LLM)."
        for row in compared
    ]
    return ["What the language model adds to its slots:", "", *lines, ""] if lines else []


def render_without_titles(result: Mapping[str, Any]) -> list[str]:
    """Return the section on the profile slots: the parts when the language model reads only slots."""
    shown = {"cf": "collaborative model", "slots_without_llm": "slots without LLM", "stage2": "stage 2"}
    rows = [row for row in result["rows"] if (row["split"], row["slice"]) == ("test", "all")]
    by_model = {(row["cf"], row["variant"], row["model"]): row for row in rows}
    cells = []
    for cell in result["cells"]:
        by_shown = [by_model.get((cell["cf"], cell["variant"], model)) for model in shown]
        cells.append([name_cell(cell), *("-" if row is None else format_number(row, "auc") for row in by_shown)])
    test_rows = rows[0]["rows"]
    return [
        "### Without titles",
        "",
        "The same parts on prompts with slots but without titles, and without stage 1 (`--profile slots`, "
        f"`benchmarks/results/reproduce_ml1m_slots.json`): the language model is a frozen reader of the slots. About "
        f"2,000 training rows, {test_rows:,} test rows, {result['cells'][0]['precision']}.",
        "",
        render_table(["AUC on test", *shown.values()], cells),
        "",
        *render_parts(result["against"]),
    ]


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
        label = f"{CF_NAMES[model]}, {_MODES[mode]}" if mode in _MODES else "id tokens, no CF model"
        cells.append([label, *_show_spread(metrics, ("train", "valid", "test", "test_uauc"))])
    return [
        "The gain from training the tables, without a language model and on all training rows: an MLP in place of the "
        f"language model reads user and item vector, mean over {record['seeds']} seeds "
        f"(`benchmarks/results/{_TABLES_FILE}`).",
        "",
        render_table(["tables", "AUC on train", "AUC on valid", "AUC on test", "UAUC on test"], cells),
        "",
    ]


def _order_mode(name: str) -> tuple[bool, str, int]:
    """Return a sort key: by model, the paper's way first; id tokens last."""
    model, _, mode = name.partition(" ")
    return mode not in _MODES, model, list(_MODES).index(mode) if mode in _MODES else 0


def _show_spread(metrics: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [f"{metrics[key]['mean']:.4f} ± {metrics[key]['std']:.4f}" for key in keys]


def _name_folds(folds: str) -> str:
    return "a CF model of all rows (off)" if folds == "0" else f"{folds} folds"
