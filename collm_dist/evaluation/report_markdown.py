"""Markdown of the report, and its main table for the terminal, rendered from the contents of report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODEL_NAMES: dict[str, str] = {
    "item_mean": "item mean",
    "item_user_mean": "item + user mean",
    "bias_logistic": "bias logistic",
    "as_of_logistic": "as-of logistic",
    "popularity": "popularity",
    "last_item_cooccurrence": "last-item co-occurrence",
    "text_similarity": "text similarity",
    "blend": "blend of simple scores",
    "anchor": "anchor alone",
    "cf": "collaborative model",
    "stage1": "stage 1 (text)",
    "stage2": "stage 2 (text + slots)",
    "slots_without_llm": "slots without LLM",
    "slots_shuffled": "stage 2, slots shuffled",
    "previous": "stage 2 of the previous run",
}
_SLICE_NAMES = {"all": "all", "warm": "warm", "cold_user": "cold user", "cold_item": "cold item"}


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned Markdown table: first column left-aligned, the others right-aligned."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]

    def render(row: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([render(cells[0]), rule, *(render(row) for row in cells[1:])])


def format_number(row: Mapping[str, Any], metric: str, *, signed: bool = False) -> str:
    """Return ``value [low, high]`` of a row, without the interval if it has none; a dash if the value is undefined."""
    if row.get(metric) is None:
        return "-"
    sign = "+" if signed else ""
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    interval = f" [{low:{sign}.4f}, {high:{sign}.4f}]" if low is not None and high is not None else ""
    return f"{row[metric]:{sign}.4f}{interval}"


def list_metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the metrics of the table in order: ranking metrics if there are any, then AUC and UAUC.

    Ranking metrics are the keys with an ``@``; a metric without a cutoff must be listed here to be shown.
    """
    ranking = sorted({key for row in rows for key in row if "@" in key and not key.endswith(("_low", "_high"))})
    ranking.sort(key=lambda key: (not key.startswith("ndcg"), int(key.split("@")[1])))
    return [*ranking, "auc", "uauc"]


def render_results(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the models on one split and slice, with the information that each model uses."""
    metrics = list_metrics(rows)
    has_logloss = any(row["logloss"] is not None for row in rows)  # candidate lists have none
    header = [
        "model",
        *(metric.upper() for metric in metrics),
        *(["log-loss"] * has_logloss),
        "training labels",
        "inputs",
    ]
    cells = [
        [
            MODEL_NAMES.get(row["model"], row["model"]),
            *(format_number(row, metric) for metric in metrics),
            *(["-" if row["logloss"] is None else f"{row['logloss']:.4f}"] * has_logloss),
            row["training_labels"],
            row["inputs"],
        ]
        for row in rows
    ]
    return render_table(header, cells)


def render_slices(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return AUC / UAUC by slice, one line per model; with candidate lists NDCG at the middle cutoff before them.

    A slice's heading says how many lists it has, and how many users its UAUC is a mean of.
    """
    ndcg = [metric for metric in list_metrics(rows) if metric.startswith("ndcg")]
    metrics = [*ndcg[len(ndcg) // 2 :][:1], "auc", "uauc"]
    slices = list(dict.fromkeys(row["slice"] for row in rows))
    by_key = {(row["model"], row["slice"]): row for row in rows}

    def head(name: str) -> str:
        of_slice = [row for row in rows if row["slice"] == name]
        users = max(row["users_counted"] for row in of_slice)
        lists = f" in {of_slice[0]['lists']:,} lists" if ndcg else ""
        return f"{_SLICE_NAMES[name]} ({of_slice[0]['rows']:,} rows{lists}, UAUC of {users:,} users)"

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    cells = [
        [MODEL_NAMES.get(model, model)]
        + [" / ".join(show(by_key[model, name][metric]) for metric in metrics) for name in slices]
        for model in dict.fromkeys(row["model"] for row in rows)
    ]
    return render_table([" / ".join(metric.upper() for metric in metrics), *map(head, slices)], cells)


def _render_gains(report: Mapping[str, Any], split: str) -> list[str]:
    """Return the section on the differences between the stages and the anchor by slice; empty without a stage.

    Without an anchor the rival is the blend.
    """
    anchor = report["anchor"]
    rival = anchor or "blend"
    gains = [
        row
        for stage in ("stage2", "stage1")
        for row in report["differences"]
        if (row["split"], row["model"], row["versus"]) == (split, stage, rival)
    ]
    if not gains:
        return []
    metrics = list_metrics(gains)
    cells = [
        [
            MODEL_NAMES[row["model"]],
            _SLICE_NAMES[row["slice"]],
            f"{row['rows']:,}",
            *(format_number(row, metric, signed=True) for metric in metrics),
        ]
        for row in gains
    ]
    name = MODEL_NAMES[rival]
    versus = f"its anchor (row: {name})" if anchor else f"{name}, since the run has no anchor"
    return [
        "### What the language model adds",
        "",
        f"Each stage minus {versus}; intervals are paired:",
        "",
        render_table(["stage", "slice", "rows", *(metric.upper() for metric in metrics)], cells),
        "",
    ]


def render_differences(differences: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of paired differences."""
    metrics = list_metrics(differences)
    cells = [
        [
            f"{MODEL_NAMES.get(row['model'], row['model'])} vs {MODEL_NAMES.get(row['versus'], row['versus'])}",
            *(format_number(row, metric, signed=True) for metric in metrics),
        ]
        for row in differences
    ]
    return render_table(["difference", *(metric.upper() for metric in metrics)], cells)


def render_calibration(calibration: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of calibration errors, with predicted and observed shares of the lowest and highest bin."""
    cells = []
    for curve in calibration:
        ends = [
            f"{tenth['predicted']:.3f} / {tenth['observed']:.3f}" for tenth in (curve["bins"][0], curve["bins"][-1])
        ]
        cells.append([MODEL_NAMES.get(curve["model"], curve["model"]), f"{curve['error']:.4f}", *ends])
    header = ["model", "expected calibration error", "lowest tenth (predicted / observed)", "highest tenth"]
    return render_table(header, cells)


def _render_header(report: Mapping[str, Any]) -> list[str]:
    data, lines = report["data"], ["# Evaluation report", ""]
    lines += [f"{verdict}\n" for verdict in report.get("verdicts", ())]  # none in reports of release 0.1
    lines += [f"**{warning}**\n" for warning in report["warnings"]]
    lines += [
        f"Data: {data['name']} (format {data['format']}, {data['feedback']} feedback, ties: {data['ties']}), "
        f"{data['num_users']:,} users, {data['num_items']:,} items.",
        "",
        render_table(
            ["split", "rows", "real events", "evaluated rows", "evaluated users", "share of likes"],
            [
                [
                    split,
                    f"{info['rows']:,}",
                    f"{info['real_rows']:,}",
                    *(
                        [f"{counts['rows']:,}", f"{counts['users']:,}", f"{counts['like_share']:.3f}"]
                        if (counts := data["evaluated"].get(split))
                        else ["-", "-", "-"]
                    ),
                ]
                for split in ("train", "valid", "test")
                if (info := data["splits"].get(split))
            ],
        ),
        "",
    ]
    lines += [f"- {note}" for note in report["notes"]]
    return [*lines, ""]


def _render_deviations(report: Mapping[str, Any]) -> list[str]:
    recipe, deviations = report["recipe"], report["deviations"]
    if recipe is None:
        return []
    lines = [f"## Settings that deviate from the paper's recipe for {recipe}", ""]
    if not deviations:
        return [*lines, "None.", ""]
    cells = [[entry[key].replace("|", r"\|") for key in ("setting", "ours", "paper")] for entry in deviations]
    return [*lines, render_table(["setting", "here", "paper"], cells), ""]


def render_markdown(report: Mapping[str, Any]) -> str:
    """Return report.md, given the contents of report.json."""
    lines = _render_header(report) + _render_deviations(report)
    for split in dict.fromkeys(row["split"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["split"] == split]
        of_all = [row for row in rows if row["slice"] == "all"]
        users = max(row["users_counted"] for row in of_all)
        lines += [f"## {split}: {of_all[0]['rows']:,} rows, UAUC over {users:,} users with both labels", ""]
        lines += [render_results(of_all), ""]
        if len(rows) > len(of_all):
            lines += [render_slices(rows), ""]
        lines += _render_gains(report, split)
        differences = [row for row in report["differences"] if (row["split"], row["slice"]) == (split, "all")]
        if differences:
            lines += [
                "Paired differences on the same bootstrap resamples of users:",
                "",
                render_differences(differences),
                "",
            ]
        calibration = [curve for curve in report["calibration"] if curve["split"] == split]
        if calibration:
            text = "Predicted and observed shares of likes by tenths of the rows; all bins are in `calibration.csv`:"
            lines += [text, "", render_calibration(calibration), ""]
        lines += [line for name in report["plots"] if name.endswith(f"-{split}.png") for line in _link(name)]
    lines += [line for name in report["plots"] if name == "training.png" for line in ["## Training", "", *_link(name)]]
    return "\n".join(lines).rstrip() + "\n"


def _link(name: str) -> list[str]:
    return [f"![{Path(name).stem.replace('-', ' ')}]({name})", ""]
