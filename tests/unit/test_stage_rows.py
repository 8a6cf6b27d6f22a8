"""Rows of the stages in a report, with made-up scores: what the language model adds, by slice."""

import numpy as np
import pytest

from collm_dist.anchor import fit_anchor, load_anchor, prepare_anchor
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.evaluation.evaluated_rows import load_splits
from collm_dist.evaluation.model_scores import collect_models
from collm_dist.evaluation.report import build_report
from collm_dist.evaluation.report_markdown import MODEL_NAMES, format_number, render_markdown
from collm_dist.metrics import compute_auc
from collm_dist.runs.atomic_files import write_json
from tests.unit.cf_data import fit_and_export, make_cf
from tests.unit.evaluation_run import build_config, write_data_step

SLICES = {"all": "all", "warm": "warm", "cold_user": "cold user", "cold_item": "cold item"}


def write_run(path, feedback="explicit", anchor=None, cf=None, prompts=None, slots_ablation=False, max_dislikes=10):
    """Write a run whose stages are done but for their weights; return its config and its directory.

    Args:
        cf: settings of the collaborative model; None = no CF step.
        prompts: text by stage.
        slots_ablation: whether slots without LLM are fitted.
        max_dislikes: dislikes stored with a row.
    """
    run_dir = write_data_step(path, feedback)
    config = build_config(path, feedback=feedback, slots_ablation=slots_ablation)
    changes = {"anchor": {"kind": anchor}, "prompt": prompts or {}, "preprocessing": {"max_dislikes": max_dislikes}}
    if cf is not None:
        changes["cf"] = {"cross_fit": 2, **cf}
        fit_and_export(run_dir, make_cf("mf", **cf), path / "states")
        write_json(run_dir.record_path("cf"), {"content_hash": "vectors"})
    config = config.model_copy(
        update={name: getattr(config, name).model_copy(update=changed) for name, changed in changes.items()}
    )
    for stage in ("stage1", "stage2"):
        write_json(run_dir.record_path(stage), {"global_steps": 2, "content_hash": stage, "train_rows": 400,
                                                "best_valid": {"step": 0}})  # fmt: skip
    prepare_anchor(config, run_dir)
    return config, run_dir


def build_stage_report(config, run_dir):
    """Return the report of ``write_run``, with made-up scores of the stages."""
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
    report = build_stage_report(*write_run(tmp_path, feedback, anchor))
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
    report = build_stage_report(*write_run(tmp_path, "implicit"))
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


TITLE_PROMPTS = {"stage1": "configs/prompts/stage1_title.txt", "stage2": "configs/prompts/stage2_title.txt"}
LIKE_PROMPTS = {"stage1": "configs/prompts/stage1.txt", "stage2": "configs/prompts/stage2.txt"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"prompts": TITLE_PROMPTS, "max_dislikes": 0},
            {"stage1": "item texts", "stage2": "ids, earlier likes", "text_similarity": "earlier likes"},
        ),
        (
            {"prompts": LIKE_PROMPTS, "cf": {}, "slots_ablation": True},
            {"stage1": "earlier likes"}
            | dict.fromkeys(("stage2", "slots_without_llm", "cf"), "ids, earlier likes")
            | {"text_similarity": "earlier likes and dislikes"},
        ),
        (
            {"prompts": TITLE_PROMPTS, "cf": {}, "anchor": "cf"},
            dict.fromkeys(("stage1", "stage2", "anchor", "cf"), "ids, earlier likes"),
        ),
        (
            {"prompts": LIKE_PROMPTS, "cf": {"feedback": "all"}, "anchor": "cf"},
            dict.fromkeys(("stage1", "stage2", "anchor", "cf", "as_of_logistic"), "all earlier feedback"),
        ),
        (
            {"prompts": TITLE_PROMPTS, "anchor": "as_of", "feedback": "implicit"},
            dict.fromkeys(("stage1", "stage2", "anchor", "blend", "last_item_cooccurrence"), "all earlier likes")
            | {"text_similarity": "earlier likes"},
        ),
    ],
)
def test_the_table_names_the_inputs_of_each_model(tmp_path, settings, expected):
    report = build_stage_report(*write_run(tmp_path, **settings))
    found = {row["model"]: row["inputs"] for row in report["rows"] if (row["split"], row["slice"]) == ("test", "all")}
    assert {model: found[model] for model in expected} == expected


@pytest.mark.parametrize(
    ("cf", "reason"),
    [
        ({}, None),
        ({"cross_fit": "off"}, "cf.cross_fit is off, so the model has seen the labels"),
        (None, "the step 'cf' has not run"),
    ],
)
def test_a_blend_without_the_collaborative_score_is_noted(tmp_path, cf, reason):
    config, run_dir = write_run(tmp_path, cf=cf)
    report = build_stage_report(config, run_dir)
    notes = [note for note in report["notes"] if note.startswith("The blend of simple scores leaves out")]
    assert len(notes) == (reason is not None)
    assert all(f": {reason}" in note and f"- {note}\n" in render_markdown(report) for note in notes)
    assert (fit_anchor(config, run_dir, "blend").source.cf is None) == (reason is not None)


@pytest.mark.parametrize(
    ("kind", "feedback", "metric"),
    [("as_of", "explicit", "auc"), ("cf", "explicit", "auc"), ("cf", "implicit", "ndcg@2")],
)
def test_an_anchor_that_is_not_the_blend_has_its_own_row(tmp_path, kind, feedback, metric):
    config, run_dir = write_run(tmp_path, feedback, kind, cf={})
    report = build_stage_report(config, run_dir)
    assert report["anchor"] == "anchor"
    rows = {row["model"]: row for row in report["rows"] if (row["split"], row["slice"]) == ("test", "all")}
    test = load_splits(config, run_dir, load_manifest(run_dir.step_dir("data")))["test"]
    scores = load_anchor(config, run_dir).score(test.block)
    assert rows["anchor"]["auc"] == pytest.approx(compute_auc(test.rows.label, scores), abs=1e-12)
    assert rows["anchor"]["auc"] != rows["blend"]["auc"]
    values = f"{metric.upper()} on test {rows['stage2'][metric]:.4f} and {rows['anchor'][metric]:.4f}"
    assert report["verdicts"][0].startswith(f"The language model adds to its anchor (anchor alone): {values}")
    assert "\n| anchor alone " in render_markdown(report)
