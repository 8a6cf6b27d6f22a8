"""The page docs/results.md with its plots, rendered from the results of benchmarks/reproduce.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.reproduction_parts import render_leak, render_tables, render_title_tuning
from benchmarks.lib.reproduction_summary import (
    DATA_SETS,
    PARTS,
    PROMPTS,
    Row,
    has_seeds,
    introduce,
    name_data_set,
    select,
    summarize,
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


def write_page(path: Path, results: Path) -> None:
    """Write the page and its plots from the data sets that have results.

    Args:
        path: the page, Markdown.
        results: folder of the results.
    """
    found = [(name, _load(file)) for name in DATA_SETS for file in _list_files(name, results)]
    parts = ["# Results", "", *(f"- {sentence}" for sentence in introduce(found))]
    missing = [title for name, (title, _) in DATA_SETS.items() if name not in dict(found)]
    if missing:
        parts.append(
            f"- No variant of the recipe has been run to its end on {' and '.join(missing)} yet "
            "(`python -m benchmarks.reproduce --help`). Runs of an earlier version on 2,000 rows are kept in "
            "`benchmarks/results/archive/reproduce_ml1m_cpu.json`: there, stage 2 was above the collaborative model in "
            "none of ten cells."
        )
    parts += [
        "",
        "Intervals are bootstrap intervals over users; differences are paired. `training labels` and `inputs` state "
        "what a model may see: only rows with equal entries compete. All settings were chosen on validation rows. "
        "[Recipes](recipes.md) explains the parts.",
        "",
    ]
    for number, (name, result) in enumerate(found):
        parts += _render_data_set(name, result, path.parent / "images")
        if name not in dict(found[number + 1 :]):
            parts += _list_not_run(name, found)
    parts += render_title_tuning(results)
    parts += ["## Without a language model", "", *render_leak(results), *render_tables(results)]
    with open_atomic(path) as file:
        file.write("\n".join(parts).rstrip() + "\n")


def _list_files(name: str, results: Path) -> list[Path]:
    """Return the results of a data set, those of its parts last."""
    return [*results.glob(f"reproduce_{name}.json"), *sorted(results.glob(f"reproduce_{name}_*.json"))]


def _load(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def _name_result(name: str, result: Mapping[str, Any]) -> str:
    return f"{name}_{result['part']}" if result["part"] else name


def _render_data_set(name: str, result: Mapping[str, Any], images: Path) -> list[str]:
    hardware = result["hardware"]
    machine = hardware.get("gpu") or f"{hardware['cpus']} CPU cores"
    file = f"reproduce_{_name_result(name, result)}.json"
    parts = [
        f"## {name_data_set(name, result)}",
        "",
        *(f"- {sentence}" for sentence in summarize(name, result)),
        "",
        f"Made by `{result['command']}` on {machine} (`benchmarks/results/{file}`). {_describe_size(result)} "
        f"{PROMPTS[name]}",
        "",
    ]
    for variant in dict.fromkeys(cell["variant"] for cell in result["cells"]):
        parts += _render_variant(name, variant, result, images)
    against = [row for row in result["against"] if row["split"] == "test" and row["slice"] == "all"]
    if against:
        parts += ["### What each part brings", "", "Stage 2 of a variant minus stage 2 of another, paired:", ""]
        parts += [render_differences([_name_parts(row, with_seed=has_seeds(result)) for row in against]), ""]
    if name == "ml1m" and not result["part"]:
        parts += [
            "### Published results, with other backbones",
            "",
            "Not measured here; their backbones are ten to fifty times as large. AUC / UAUC on the whole test split.",
            "",
            render_table(["published", "AUC / UAUC"], [[model, figures] for model, figures in PUBLISHED]),
            "",
        ]
    cells = [
        [PARTS[cell["variant"]], str(cell["seed"]), cell["precision"], f"{cell['seconds'] / 60:.0f}"]
        for cell in result["cells"]
    ]
    parts += ["### Runs", "", render_table(["variant", "seed", "precision", "minutes"], cells), ""]
    return parts


def _list_not_run(name: str, found: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return a sentence on the variants of a data set that neither the whole size nor a part has run, if any."""
    results = [result for other, result in found if other == name]
    run = {cell["variant"] for result in results for cell in result["cells"]}
    missing = [cell for cell in results[0]["not_run"] if cell.rpartition("-")[0] not in run]
    return [f"Not run yet: {'; '.join(_name_cell(cell, results[0]) for cell in missing)}.", ""] if missing else []


def _name_parts(row: Row, *, with_seed: bool) -> dict[str, Any]:
    """Return a row of ``against`` with the names of both variants as its models."""
    seed = f", seed {row['seed']}" if with_seed else ""
    return {**row, "model": PARTS[row["variant"]], "versus": f"{PARTS[row['versus']]}{seed}"}


def _name_cell(cell: str, result: Mapping[str, Any]) -> str:
    variant, _, seed = cell.rpartition("-")
    return PARTS[variant] + (f", seed {seed}" if has_seeds(result) else "")


def _render_variant(name: str, variant: str, result: Mapping[str, Any], images: Path) -> list[str]:
    metric, file = DATA_SETS[name][1], _name_result(name, result)
    rows = select(result["rows"], variant)
    seed = f", seed {rows[0]['seed']}" if rows and has_seeds(result) else ""
    parts = [f"### {PARTS[variant][0].upper()}{PARTS[variant][1:]}{seed}", "", render_results(rows), ""]
    if variant == "full":
        shown = [row for row in rows if row["model"] != "slots_shuffled"]
        figure = plot_forest(shown, MODEL_NAMES, metric, f"{metric.upper()} on test, {rows[0]['rows']:,} rows")
        if figure is not None:
            figure.axes[0].set_xlabel(metric.upper())
            save_figure(figure, images / f"reproduction_{file}.png")
            parts += [f"![{metric.upper()} of every model](images/reproduction_{file}.png)", ""]
        parts += [render_slices(select(result["rows"], variant, ("all", "warm", "cold_user", "cold_item"))), ""]
    return [*parts, render_differences(select(result["differences"], variant)), ""]


def _describe_size(result: Mapping[str, Any]) -> str:
    data = result["cells"][-1]["data"]
    train, test = data["splits"]["train"], data["evaluated"]["test"]
    text = f"{train['rows']:,} training rows in {train['contexts']:,} contexts; {test['rows']:,} evaluated test rows."
    if result["overrides"]:
        text += " The overrides in the command make it a part of the full size."
    return text
