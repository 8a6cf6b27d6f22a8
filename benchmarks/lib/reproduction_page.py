"""The page docs/results.md with its plots, rendered from the results of benchmarks/reproduce_ml1m.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.reproduction_names import name_cell, name_model
from benchmarks.lib.reproduction_parts import (
    render_leak,
    render_llm_share,
    render_parts,
    render_tables,
    render_without_titles,
)
from collm_dist.evaluation.plots import plot_forest, save_figure
from collm_dist.evaluation.report_markdown import (
    MODEL_NAMES,
    render_differences,
    render_results,
    render_slices,
    render_table,
)
from collm_dist.runs.atomic_files import open_atomic

# AUC / UAUC on the released split as published, with Vicuna-7B unless named otherwise: Zhang et al., arXiv 2310.19488,
# and for BinLLM, GraphLoRA and SAILRec the papers of these names.
PUBLISHED = (
    ("MF", ".6482 / .6361"),
    ("LightGCN", ".5959 / .6499"),
    ("SASRec", ".7078 / .6884"),
    ("DIN", ".7166 / .6459"),
    ("TALLRec (text only)", ".7097 / .6818"),
    ("TALLRec, Qwen2-1.5B", ".7027 / .6638"),
    ("id tokens from scratch", ".7214 / .6563"),
    ("CoLLM-MF", ".7295 / .6875"),
    ("CoLLM-MF, Qwen2-1.5B", ".7354 / .6950"),
    ("CoLLM-LightGCN", ".7100 / .6967"),
    ("CoLLM-SASRec", ".7235 / .6990"),
    ("CoLLM-DIN", ".7353 / .6923"),
    ("CoLLM-MF that also trains the CF model", ".7360 / .6946"),
    ("BinLLM", ".7425 / .6956"),
    ("GraphLoRA", ".7472 / .7102"),
    ("SAILRec", ".7571 / not given"),
)
# Models that stage 2 is compared with in the plot.
_PLOTTED = ("slots_without_llm", "cf", "as_of_logistic")


def name_rows(rows: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows whose ``model`` includes the cell; rows that all cells share, once per precision."""
    named: dict[str, dict[str, Any]] = {}
    precisions = {(cell["cf"], cell["variant"]): cell["precision"] for cell in cells}
    for row in rows:
        name = name_model(row, row["model"])
        if row["model"] == "stage1" and len(set(precisions.values())) > 1:
            name = f"{name}, {precisions[row['cf'], row['variant']]}"
        named.setdefault(f"{row['slice']} {name}", {**row, "model": name})
    order = {False: 0, True: 1}
    return sorted(named.values(), key=lambda row: order[": " in row["model"]])


def select(rows: Sequence[Mapping[str, Any]], slices: Sequence[str] = ("all",)) -> list[Mapping[str, Any]]:
    """Return the test rows of some slices."""
    return [row for row in rows if row["split"] == "test" and row["slice"] in slices]


def name_differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return differences whose ``model`` includes the cell, each once; ``pair`` holds the keys of the models."""
    named: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        versus = MODEL_NAMES.get(row["versus"], row["versus"])
        if row["model"] == "stage1":  # its name does not include the collaborative model
            versus = name_model(row, row["versus"])
        key = name_model(row, row["model"]), versus
        named.setdefault(key, {**row, "pair": (row["model"], row["versus"]), "model": key[0], "versus": key[1]})
    return list(named.values())


def judge(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each comparison of stage 2: the number of cells in which it is above and below."""
    lines = []
    for versus in dict.fromkeys(row["versus"] for row in differences if row["model"] == "stage2"):
        compared = [row for row in differences if (row["model"], row["versus"]) == ("stage2", versus)]
        above = sum(row["auc_low"] is not None and row["auc_low"] > 0 for row in compared)
        below = sum(row["auc_high"] is not None and row["auc_high"] < 0 for row in compared)
        first = f"above in {above}" if above else "**above in none**"
        lines.append(
            f"- Stage 2 against {MODEL_NAMES.get(versus, versus)}, AUC: {first} of {len(compared)} cells, below in "
            f"{below}; in the others the interval includes zero."
        )
    return lines


def write_page(path: Path, results: Path) -> None:
    """Write the page and its plots from the largest profile that has results; without results, write nothing.

    Args:
        path: the page, Markdown.
        results: folder of the results.
    """
    by_profile = {name: _load(results / f"reproduce_ml1m_{name}.json") for name in ("gpu", "cpu", "slots")}
    result = by_profile["gpu"] or by_profile["cpu"]
    if result is None:
        return
    rows, differences = name_rows(select(result["rows"]), result["cells"]), select(result["differences"])
    shown = [row for row in rows if not row["model"].endswith(MODEL_NAMES["slots_shuffled"])]
    plots = {"auc": plot_forest(shown, {}, "auc", f"AUC on test, {rows[0]['rows']:,} rows")}
    plotted = [
        {**row, "model": f"{row['model']} minus {row['versus']}"}
        for row in name_differences(differences)
        if row["pair"][0] == "stage2" and row["pair"][1] in _PLOTTED
    ]
    plots["differences"] = plot_forest(plotted, {}, "auc", "Paired differences in AUC")
    for name, figure in plots.items():
        if figure is not None:
            figure.axes[0].set_xlabel({"auc": "AUC", "differences": "difference in AUC"}[name])
            if name == "differences":
                figure.axes[0].axvline(0, color="0.4", linewidth=0.8)
                figure.axes[0].set_xlim(*_span(plotted))
            save_figure(figure, path.parent / "images" / f"reproduction_{result['profile']}_{name}.png")
    names = [name for name in plots if plots[name] is not None]
    parts = [
        *render_parts([row for row in result["against"] if row["split"] == "test"]),
        *render_llm_share(differences),
        *(render_without_titles(by_profile["slots"]) if by_profile["slots"] else []),
        *render_leak(results),
        *render_tables(results),
    ]
    with open_atomic(path) as file:
        file.write(_render(result, rows, differences, names, parts))


def _load(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _span(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    ends = [row[key] for row in rows for key in ("auc_low", "auc_high", "auc") if row.get(key) is not None]
    margin = 0.1 * max(0.02, max(ends) - min(ends))
    return min(0.0, *ends) - margin, max(0.0, *ends) + margin


def _render(
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    differences: Sequence[Mapping[str, Any]],
    plots: Sequence[str],
    parts: Sequence[str],
) -> str:
    profile, hardware = result["profile"], result["hardware"]
    machine = hardware.get("gpu") or f"{hardware['cpus']} CPU cores"
    sliced = name_rows(select(result["rows"], ("all", "warm", "cold_user", "cold_item")), result["cells"])
    lines = [
        "# Results on MovieLens-1M, as the CoLLM authors split it",
        "",
        f"Made by `python -m benchmarks.reproduce_ml1m --data DIR --profile {profile}` on {machine} "
        f"(`benchmarks/results/reproduce_ml1m_{profile}.json`). {_describe_size(result, rows)}",
        "",
        "Intervals are bootstrap intervals over users; differences are paired. `training labels` and `inputs` state "
        "what a model may see: only rows with equal entries compete.",
        "",
        *judge(differences),
        "",
        "## What each part brings",
        "",
        "`docs/recipes.md` explains each part and its settings.",
        "",
        *parts,
        "## Every model",
        "",
        render_results(rows),
        "",
        *(f"![{name}](images/reproduction_{profile}_{name}.png)\n" for name in plots),
        "## Differences",
        "",
        render_differences(name_differences(differences)),
        "",
        "## Warm and cold",
        "",
        render_slices(sliced),
        "",
        "## Published results, with other backbones",
        "",
        "Not measured here; their backbones are ten to fifty times as large. AUC / UAUC on the whole test split.",
        "",
        render_table(["published", "AUC / UAUC"], [[name, figures] for name, figures in PUBLISHED]),
        "",
        "## Cells",
        "",
        render_table(["cell", "seed", "precision", "minutes"], [_describe_cell(cell) for cell in result["cells"]]),
        "",
        "All cells are tested on the same rows. Minutes are those of the cell's own steps, on a machine that may have "
        "run other work; data, CF model and stage 1 are reused from an earlier cell with the same settings.",
    ]
    if result["not_run"]:
        lines += ["", f"Not run yet: {', '.join(result['not_run'])}."]
    return "\n".join(lines) + "\n"


def _describe_cell(cell: Mapping[str, Any]) -> list[str]:
    return [name_cell(cell), str(cell["seed"]), cell["precision"], f"{cell['seconds'] / 60:.0f}"]


def _describe_size(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    if result["profile"] == "gpu":
        return "Each stage trains on all training rows, with early stopping."
    return (
        f"Each stage trains once on about 2,000 of the 33,891 rows and is tested on {rows[0]['rows']:,} rows: this "
        "shows how the parts affect each other, not how good they can be."
    )
