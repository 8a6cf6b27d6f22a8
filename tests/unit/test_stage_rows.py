"""Rows of the stages in a report, with made-up scores: what the language model adds, by slice."""

import numpy as np
import pytest

from collm_dist.anchor import prepare_anchor
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.evaluation.evaluated_rows import load_splits
from collm_dist.evaluation.model_scores import collect_models
from collm_dist.evaluation.report import build_report
from collm_dist.evaluation.report_markdown import MODEL_NAMES, format_number, render_markdown
from collm_dist.runs.atomic_files import write_json
from tests.unit.evaluation_run import build_config, write_data_step

SLICES = {"all": "all", "warm": "warm", "cold_user": "cold user", "cold_item": "cold item"}


def report_stages(path, feedback="explicit", anchor=None):
    """Return the report of a run whose stages have made-up scores."""
    run_dir = write_data_step(path, feedback)
    config = build_config(path, feedback=feedback, slots_ablation=False)
    config = config.model_copy(update={"anchor": config.anchor.model_copy(update={"kind": anchor})})
    for stage in ("stage1", "stage2"):
        write_json(run_dir.record_path(stage), {"global_steps": 2, "content_hash": stage, "train_rows": 400,
                                                "best_valid": {"step": 0}})  # fmt: skip
    prepare_anchor(config, run_dir)
    manifest = load_manifest(run_dir.step_dir("data"))
    splits = load_splits(config, run_dir, manifest)
    random = np.random.default_rng(0)
    stage_scores = {
        (stage, split): rows.rows.label * strength + random.normal(size=len(rows.rows.label))
        for stage, strength in (("stage1", 0.2), ("stage2", 3.0))
        for split, rows in splits.items()
    }
    scores = collect_models(config, run_dir, manifest, splits, stage_scores)
    return {**build_report(config, manifest, splits, scores), "plots": []}


def read_table(text, begin):
    """Return the cells of the table that follows a line, or that begins with it."""
    lines = text[text.index(begin) :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    last = next((number for number in range(first, len(lines)) if not lines[number].startswith("|")), len(lines))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[first:last]]


@pytest.mark.parametrize(
    ("feedback", "anchor", "rival", "metrics"),
    [
        ("explicit", None, "blend", ["auc", "uauc"]),
        ("explicit", "as_of", "anchor", ["auc", "uauc"]),
        ("implicit", "blend", "blend", ["ndcg@1", "ndcg@2", "hr@1", "hr@2", "auc", "uauc"]),
    ],
)
def test_what_the_language_model_adds_by_slice(tmp_path, feedback, anchor, rival, metrics):
    report = report_stages(tmp_path, feedback, anchor)
    of_test = render_markdown(report).split("\n## test")[1]
    section = of_test[of_test.index("### What the language model adds") :]
    sentence = section.splitlines()[2]
    assert MODEL_NAMES[rival] in sentence
    assert ("its anchor" in sentence, "no anchor" in sentence) == (anchor is not None, anchor is None)
    header, _, *cells = read_table(section, "###")
    assert header == ["stage", "slice", "rows", *(metric.upper() for metric in metrics)]
    expected = {
        (row["model"], row["slice"]): row
        for row in report["differences"]
        if row["split"] == "test" and row["versus"] == rival and row["model"] != "cf"
    }
    assert {name for _, name in expected} == set(SLICES)
    assert cells == [
        [MODEL_NAMES[stage], SLICES[name], f"{row['rows']:,}"]
        + [format_number(row, metric, signed=True) for metric in metrics]
        for stage in ("stage2", "stage1")
        for name in SLICES
        for row in [expected[stage, name]]
    ]
    assert all("[" in cell for cell in cells[0][3:] + cells[1][3:])  # all and warm have users enough for intervals


def test_slices_of_candidate_lists_show_ndcg(tmp_path):
    report = report_stages(tmp_path, "implicit")
    by_key = {
        (row["model"], row["slice"]): row for row in report["rows"] if row["split"] == "test" and row["slice"] in SLICES
    }
    header, _, *cells = read_table(render_markdown(report).split("\n## test")[1], "| NDCG@2 / AUC / UAUC")
    heads = [by_key["stage2", name] for name in SLICES]
    assert header[1:] == [
        f"{SLICES[row['slice']]} ({row['rows']} rows in {row['lists']} lists, UAUC of {row['users_counted']} users)"
        for row in heads
    ]
    found = dict(zip((cell[0] for cell in cells), cells, strict=True))
    for model in ("popularity", "stage2"):
        rows = [by_key[model, name] for name in SLICES]
        assert found[MODEL_NAMES[model]][1:] == [
            f"{row['ndcg@2']:.3f} / {row['auc']:.3f} / {row['uauc']:.3f}" for row in rows
        ]
