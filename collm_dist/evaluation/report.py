"""Evaluation step: score all models, compare them, write report.json, report.md, figures and score files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure

from collm_dist import monitoring
from collm_dist.config import Config
from collm_dist.data.prompts.prompt_template import load_prompt_text
from collm_dist.data.shards.manifest import Manifest, load_manifest
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.evaluation.calibration import list_calibration, write_calibration
from collm_dist.evaluation.comparison import TableSettings, compute_table
from collm_dist.evaluation.deviations import list_deviations
from collm_dist.evaluation.evaluated_rows import EvaluatedSplit, load_splits
from collm_dist.evaluation.hparams import build_run_settings
from collm_dist.evaluation.model_scores import ModelScores, collect_models
from collm_dist.evaluation.plots import plot_calibration, plot_forest, plot_training, save_figure
from collm_dist.evaluation.report_markdown import MODEL_NAMES, list_metrics, render_markdown, render_results
from collm_dist.evaluation.report_notes import describe_data, list_notes, list_warnings
from collm_dist.evaluation.score_files import write_scores
from collm_dist.evaluation.simple_rivals import describe_proven_loss, name_anchor
from collm_dist.evaluation.slot_inputs import list_slots
from collm_dist.evaluation.stage_scores import score_stages
from collm_dist.evaluation.verdict import list_verdicts
from collm_dist.metrics import compute_auc, compute_ndcg
from collm_dist.phases import show_phase
from collm_dist.runs.atomic_files import compute_json_hash, open_atomic
from collm_dist.runs.file_hashes import hash_products
from collm_dist.runs.fingerprints import is_report_current
from collm_dist.runs.run_dir import RunDir

TRIVIAL = frozenset(
    {
        "item_mean",
        "item_user_mean",
        "bias_logistic",
        "as_of_logistic",
        "popularity",
        "last_item_cooccurrence",
        "text_similarity",
        "blend",
    }
)
# Trivial baseline to compare with if valid is not evaluated; it is never chosen on test.
_FALLBACK_TRIVIAL = {"explicit": "as_of_logistic", "implicit": "popularity"}


def run_evaluation(config: Config, run_dir: RunDir, force: bool = False) -> dict[str, Any]:
    """Evaluate all finished steps of a run and write the report.

    Under a launcher all processes call this: all score, and rank 0 writes the report. The report lists steps that have
    not run as missing.

    Args:
        config: the experiment.
        run_dir: a run whose data step is done.
        force: evaluate again even if the report is up to date.

    Returns:
        The contents of report.json on rank 0, an empty dictionary on other ranks.

    Raises:
        ArtifactError: the data step is not done, an artifact is damaged, or the existing report has other inputs.
    """
    is_first = int(os.environ.get("RANK", "0")) == 0
    fingerprint = compute_step_fingerprint(config, run_dir, "eval")
    if not force and is_report_current(run_dir, fingerprint):
        report = run_dir.read_record("eval")
        if is_first:
            print(f"eval: up to date ({run_dir.record_path('eval')})", flush=True)
        return report if is_first else {}
    manifest = load_manifest(run_dir.step_dir("data"))
    with show_phase("eval: reading rows"):
        splits = load_splits(config, run_dir, manifest)
    if is_first:
        counts = ", ".join(f"{name} {split.order.num_rows:,} rows" for name, split in splits.items())
        print(f"eval: scoring {counts}", flush=True)
    stage_scores = score_stages(config, run_dir, splits)
    if not is_first:
        return {}
    scores = collect_models(config, run_dir, manifest, splits, stage_scores)
    report = build_report(config, manifest, splits, scores)
    report["fingerprint"] = fingerprint
    with show_phase("eval: figures"):
        figures = build_figures(config, run_dir, splits, scores, report)
    write_report(config, run_dir, splits, scores, report, figures)
    return report


def choose_best_trivial(
    splits: Mapping[str, EvaluatedSplit], scores: ModelScores, feedback: str, cutoffs: Sequence[int]
) -> str:
    """Return the best trivial baseline on valid, by NDCG for candidate lists, else by AUC."""
    if "valid" not in splits:
        return _FALLBACK_TRIVIAL[feedback]
    rows, by_name = splits["valid"].rows, {}
    for model in scores.models["valid"]:
        if model.name in TRIVIAL:
            if cutoffs:
                value = compute_ndcg(rows.label, model.scores, rows.group_id, cutoffs[len(cutoffs) // 2])
            else:
                value = compute_auc(rows.label, model.scores)
            if value is not None:
                by_name[model.name] = value
    return max(by_name, key=lambda name: by_name[name]) if by_name else _FALLBACK_TRIVIAL[feedback]


def list_pairs(best_trivial: str, baseline: str, anchor: str | None) -> list[tuple[str, str]]:
    """Return the (model, versus) pairs that the report compares, the most important first.

    Args:
        best_trivial: see ``choose_best_trivial``.
        baseline: ``promotion.baseline``.
        anchor: row of the run's anchor; None = compare with the blend of simple scores.
    """
    rival = anchor or "blend"
    pairs = [
        ("stage2", rival),
        ("stage1", rival),
        ("stage2", "slots_without_llm"),
        ("stage2", "slots_shuffled"),
        ("stage2", "stage1"),
        ("stage2", "cf"),
        ("stage2", best_trivial),
        ("stage1", "cf"),
        ("stage1", best_trivial),
        ("cf", best_trivial),
        ("stage2", rival if baseline == "anchor" else baseline),
    ]
    return list(dict.fromkeys(pairs))


def build_report(
    config: Config, manifest: Manifest, splits: Mapping[str, EvaluatedSplit], scores: ModelScores
) -> dict[str, Any]:
    """Return the contents of report.json, without ``plots`` and ``fingerprint``."""
    evaluation = config.evaluation
    cutoffs = evaluation.cutoffs if manifest.feedback == "implicit" else ()
    settings = TableSettings(evaluation.bootstrap_samples, evaluation.confidence, config.run.seed, cutoffs)
    best_trivial = choose_best_trivial(splits, scores, manifest.feedback, cutoffs)
    anchor = name_anchor(config)
    pairs = list_pairs(best_trivial, config.promotion.baseline, anchor)
    table: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    for name, split in splits.items():
        rows, compared = compute_table(split.rows, scores.models[name], pairs, settings)
        table += [row for row in rows if name != "train" or row["slice"] == "all"]
        differences += compared
    slots = list_slots(load_prompt_text(config.prompt.stage2))
    report: dict[str, Any] = {
        "format_version": 1,
        "data": describe_data(config, manifest, {name: split.rows for name, split in splits.items()}),
        "recipe": config.evaluation.recipe,
        "deviations": [asdict(deviation) for deviation in list_deviations(config, slots)],
        "rows": table,
        "differences": differences,
        "best_trivial": best_trivial,
        "anchor": anchor,
        "left_out": scores.left_out,
    }
    # Candidate lists have another share of likes than the training rows, so they say nothing about calibration.
    calibrated = () if cutoffs else config.evaluation.splits
    report["calibration"] = [
        curve for name in calibrated for curve in list_calibration(splits[name].rows, scores.models[name])
    ]
    report["verdicts"] = list_verdicts(report, config.main_metric)
    report["proven_loss"] = describe_proven_loss(report, config.main_metric) if anchor else None
    report["warnings"] = list_warnings(report, evaluation.confidence)
    report["warnings"] += [f"WARNING: {report['proven_loss']}."] if report["proven_loss"] else []
    report["notes"] = list_notes(config, report)
    report["content_hash"] = compute_json_hash(report)
    return report


def build_figures(
    config: Config,
    run_dir: RunDir,
    splits: Mapping[str, EvaluatedSplit],
    scores: ModelScores,
    report: Mapping[str, Any],
) -> dict[str, Figure]:
    """Return the figures by file name."""
    figures: dict[str, Figure | None] = {}
    for split in config.evaluation.splits:
        rows = [row for row in report["rows"] if (row["split"], row["slice"]) == (split, "all")]
        has_intervals = config.evaluation.bootstrap_samples > 0
        percent = f", {config.evaluation.confidence:.0%} intervals" if has_intervals else ""
        for metric in list_metrics(rows):
            if metric == "auc" or metric.startswith("ndcg"):
                title = f"{metric.upper()} on {split}, {rows[0]['rows']:,} rows{percent}"
                file_name = f"{metric.replace('@', '-at-')}-{split}.png"
                figures[file_name] = plot_forest(rows, MODEL_NAMES, metric, title)
        logits = {MODEL_NAMES[model.name]: model.scores for model in scores.models[split] if model.has_logits}
        if logits and report["calibration"]:
            title = f"Calibration on {split}"
            figures[f"calibration-{split}.png"] = plot_calibration(splits[split].rows.label, logits, title)
    logs = {stage: run_dir.path / stage / "metrics.jsonl" for stage in ("stage1", "stage2")}
    figures["training.png"] = plot_training(logs)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _remove_old(run_dir: RunDir) -> None:
    """Remove an earlier report, its record first, so that a record never lies beside files of another report."""
    run_dir.withdraw("eval")
    folder = run_dir.step_dir("eval")
    for name in ("scores", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for plot in folder.glob("*.png"):
        plot.unlink()


def write_report(
    config: Config,
    run_dir: RunDir,
    splits: Mapping[str, EvaluatedSplit],
    scores: ModelScores,
    report: dict[str, Any],
    figures: Mapping[str, Figure],
) -> None:
    """Write score files, figures, report.md and, last, report.json; print the tables and paths."""
    folder = run_dir.step_dir("eval")
    _remove_old(run_dir)
    for name, split in splits.items():
        for model in scores.models[name]:
            write_scores(folder / "scores", split.rows, model)
    for file_name, figure in figures.items():
        save_figure(figure, folder / file_name)
    report["plots"] = list(figures)
    with open_atomic(folder / "calibration.csv") as file:
        write_calibration(file, report["calibration"])
    markdown = render_markdown(report)
    with open_atomic(folder / "report.md") as file:
        file.write(markdown)
    if config.monitoring.tensorboard:
        paths = {name: folder / name for name in figures}
        monitoring.log_report(folder / "tensorboard", markdown, paths, build_run_settings(config, report))
    report["files"] = hash_products(folder)
    run_dir.write_record("eval", report)
    for split_name in config.evaluation.splits:
        rows = [row for row in report["rows"] if (row["split"], row["slice"]) == (split_name, "all")]
        print(f"\n{split_name}, {rows[0]['rows']:,} rows\n{render_results(rows)}")
    for line in [*report["verdicts"], *report["warnings"]]:
        print(f"\n{line}")
    given = f"--config {run_dir.path / 'config.yaml'}"
    print(
        f"\nreport: {folder / 'report.md'}\ntensorboard --logdir {run_dir.path}\n\n"
        f"rank users:  python launch/score_candidates.py {given} --input USERS.parquet --output DIR\n"
        f"serve:       python launch/serve.py {given}\n"
        f"export:      python launch/export_model.py {given} --output DIR",
        flush=True,
    )
