"""Records of the reproduction's variants, and the page rendered from them."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import reproduce
from benchmarks.lib.reproduction_page import write_page
from benchmarks.lib.reproduction_parts import render_leak, render_tables, render_title_tuning
from benchmarks.lib.reproduction_records import Cell, compare_cells, read_record
from benchmarks.lib.reproduction_summary import DATA_SETS, PARTS, introduce, summarize
from benchmarks.title_tuning import WAYS
from collm_dist.config.loader import dump_config
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.evaluation.evaluated_rows import load_splits
from collm_dist.metrics import compute_auc
from collm_dist.runs.atomic_files import write_json
from tests.unit.evaluation_run import build_config, write_data_step

FULL, OTHER = Cell("full", 0), Cell("no_anchor", 0)


def write_cell(folder, cell, settings, auc):
    def row(model, value):
        return {"model": model, "split": "test", "slice": "all", "rows": 40, "users_counted": 8, "auc": value,
                "auc_low": 0.5, "auc_high": 0.9, "uauc": value, "uauc_low": 0.5, "uauc_high": 0.9, "logloss": 0.6,
                "training_labels": "all", "inputs": "likes"}  # fmt: skip

    difference = {"model": "stage2", "versus": "anchor", "split": "test", "slice": "all", "rows": 40, "auc": -0.01,
                  "auc_low": -0.05, "auc_high": 0.03, "uauc": 0.0, "uauc_low": None, "uauc_high": None}  # fmt: skip
    data = {"splits": {"train": {"rows": 100, "contexts": 60}}, "evaluated": {"test": {"rows": 40}}}
    record = {"variant": cell.variant, "seed": cell.seed, "settings": settings, "seconds": 60.0,
              "precision": "float32", "hardware": {"cpus": 2}, "versions": {}, "warnings": [], "data": data,
              "rows": [row("anchor", 0.55), row("stage2", auc)], "differences": [difference],
              "against": []}  # fmt: skip
    write_json(cell.find_record(folder), record)


def parse(monkeypatch, tmp_path, *extra, data_set="ml1m"):
    folders = ["--data", tmp_path, "--work", tmp_path / "runs", "--output", tmp_path]
    monkeypatch.setattr("sys.argv", ["reproduce", "--data-set", data_set, *map(str, folders), *extra])
    return reproduce.parse_arguments()


def test_records_count_without_their_runs_while_settings_are_the_same(monkeypatch, tmp_path):
    arguments = parse(monkeypatch, tmp_path, "--variants", "no_anchor")
    assert arguments.chosen == [OTHER]
    folder = reproduce.find_records(arguments)
    for cell, auc in ((FULL, 0.6), (OTHER, 0.7)):
        write_cell(folder, cell, reproduce.list_settings(cell, arguments), auc)
    result = reproduce.collect(arguments)  # all variants', though one is chosen
    rows = [row for row in result["rows"] if row["model"] == "stage2"]
    assert [(row["data_set"], row["variant"], row["auc"]) for row in rows] == [
        ("ml1m", "full", 0.6),
        ("ml1m", "no_anchor", 0.7),
    ]
    assert set(result["not_run"]) >= {"titles-0", "likes-0"}
    other = parse(monkeypatch, tmp_path, "--overrides", "evaluation.max_users=7")
    assert read_record(OTHER, folder, reproduce.list_settings(OTHER, other)) is None


def write_scores(runs, cell, noise, random):
    """Write a cell's run with stage 2's scores, and return (evaluated rows, their scores)."""
    run_dir = write_data_step(cell.find_run(runs))
    config = build_config(run_dir.path, splits=["test"])
    (run_dir.path / "config.yaml").write_text(dump_config(config))
    rows = load_splits(config, run_dir, load_manifest(run_dir.step_dir("data")))["test"].rows
    scores = rows.label + noise * random.normal(size=len(rows.label))
    order = np.argsort(rows.row_id)
    path = run_dir.path / "eval" / "scores" / "stage2-test.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"row_id": rows.row_id[order], "score": scores[order]}), path)
    return rows, scores


def test_a_variant_is_compared_with_its_base_on_the_same_rows(tmp_path):
    """Score files are sorted by row id, the evaluated rows are not."""
    random, runs = np.random.default_rng(0), tmp_path / "runs"
    scores = {}
    for cell, noise in ((FULL, 3.0), (OTHER, 0.5)):
        scores[cell] = write_scores(runs, cell, noise, random)
        write_cell(tmp_path, cell, [], 0.6)
    rows, full, other = scores[FULL][0], scores[FULL][1], scores[OTHER][1]
    compare_cells(OTHER, FULL, tmp_path, runs)
    assert json.loads(FULL.find_record(tmp_path).read_text())["against"] == []
    against = json.loads(OTHER.find_record(tmp_path).read_text())["against"]
    whole = next(row for row in against if row["slice"] == "all")
    expected = compute_auc(rows.label, other) - compute_auc(rows.label, full)
    assert whole["auc"] == pytest.approx(expected, abs=1e-12)
    assert 0 < whole["auc_low"] < whole["auc"] < whole["auc_high"]
    assert whole["versus"] == "full"
    assert "cold_item" in {row["slice"] for row in against}


def test_a_variant_is_not_compared_with_a_base_of_other_settings(monkeypatch, tmp_path):
    then, now = (
        parse(monkeypatch, tmp_path, "--overrides", f"stage2.max_train_contexts={size}") for size in (100, 900)
    )
    folder, random = reproduce.find_records(now), np.random.default_rng(0)
    for cell, arguments in ((FULL, then), (OTHER, now)):
        write_scores(now.work, cell, 1.0, random)
        write_cell(folder, cell, reproduce.list_settings(cell, arguments), 0.6)
    reproduce.compare_variants(OTHER, now)
    assert json.loads(OTHER.find_record(folder).read_text())["against"] == []
    write_cell(folder, FULL, reproduce.list_settings(FULL, now), 0.6)
    reproduce.compare_variants(FULL, now)
    assert {row["versus"] for row in json.loads(OTHER.find_record(folder).read_text())["against"]} == {"full"}


def test_the_page_leads_with_what_the_language_model_adds(monkeypatch, tmp_path):
    arguments = parse(monkeypatch, tmp_path, "--overrides", "evaluation.max_users=7")
    for cell in (FULL, OTHER):
        write_cell(reproduce.find_records(arguments), cell, reproduce.list_settings(cell, arguments), 0.6)
    result = reproduce.collect(arguments)
    write_json(tmp_path / "reproduce_ml1m.json", result)
    page = tmp_path / "docs" / "results.md"
    write_page(page, tmp_path)
    lines = page.read_text().splitlines()
    assert lines[2] == (
        "- On MovieLens-1M, the language model is not proven to improve on its anchor alone: of 100 pairs of a like "
        "and a dislike it puts 60.00 in the right order, that score alone 55.00 "
        "(AUC, difference -0.0100 [-0.0500, +0.0300])."
    )
    assert lines[lines.index("## MovieLens-1M") + 2] == (
        "- The whole recipe: stage 2 (text + slots) (AUC 0.6000) cannot be told from its anchor alone (0.5500), "
        "difference -0.0100 [-0.0500, +0.0300]."
    )
    assert "The overrides in the command make it a part of the full size." in page.read_text()
    assert "Not run yet: titles alone as item text; " in page.read_text()
    assert (tmp_path / "docs" / "images" / "reproduction_ml1m.png").stat().st_size > 5000
    better = json.loads(json.dumps(result).replace("-0.05,", "0.005,"))
    assert "is better than its anchor alone" in summarize("ml1m", better)[0]
    part = {**result, "overrides": ["evaluation.max_users=7", "stage2.max_train_contexts=1"]}
    assert introduce([("ml1m", better)])[0].startswith(
        "On MovieLens-1M, the language model improves on its anchor alone"
    )
    for sentences in (summarize("ml1m", part), introduce([("ml1m", part)])):
        assert " part of the training contexts: 1 (" in sentences[-1] or "model has seen 1 (" in sentences[-1]
    assert "has seen" not in "".join([*summarize("ml1m", result), *introduce([("ml1m", result)])])
    assert introduce([("ml1m", result), ("ml1m", {**better, "part": "small"})]) == [lines[2][2:]]
    write_page(tmp_path / "none.md", tmp_path / "docs")
    text = (tmp_path / "none.md").read_text()
    assert "No variant of the recipe has been run to its end on MovieLens-1M and Amazon Industrial yet" in text
    assert "## MovieLens-1M" not in text


def test_results_of_other_seeds_are_kept_and_told_apart(monkeypatch, tmp_path):
    second = parse(monkeypatch, tmp_path, "--seeds", "1")
    folder = reproduce.find_records(second)
    for cell in (OTHER, Cell("no_anchor", 1)):
        write_cell(folder, cell, reproduce.list_settings(cell, second), 0.6)
        record = json.loads(cell.find_record(folder).read_text())
        against = [{**record["differences"][0], "versus": "full", "auc": 0.01 * (1 + cell.seed)}]
        write_json(cell.find_record(folder), record | {"against": against})
    write_cell(folder, Cell("full", 2), ["other=settings"], 0.6)
    result = reproduce.collect(second)
    assert [(cell["variant"], cell["seed"]) for cell in result["cells"]] == [("no_anchor", 0), ("no_anchor", 1)]
    assert result["command"].endswith("--data DIR --seeds 0 1")
    assert {"full-0", "full-1"} < set(result["not_run"])
    assert "full-2" not in result["not_run"]
    write_json(tmp_path / "reproduce_ml1m.json", result)
    write_page(tmp_path / "docs" / "results.md", tmp_path)
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "- Without the anchor, seed 0: stage 2 (text + slots) (AUC 0.6000)" in page
    assert "Not run yet: the whole recipe, seed 0; " in page
    assert "### Without the anchor, seed 0" in page
    for seed in (0, 1):
        assert f"without the anchor vs the whole recipe, seed {seed} | +0.0{1 + seed}00 [" in page


def test_a_part_has_records_result_and_section_of_its_own(monkeypatch, tmp_path):
    for extra, cell, auc in (
        ([], FULL, 0.6),
        (["--part", "small", "--overrides", "evaluation.max_users=7"], OTHER, 0.7),
    ):
        arguments = parse(monkeypatch, tmp_path, *extra)
        write_cell(reproduce.find_records(arguments), cell, reproduce.list_settings(cell, arguments), auc)
        result = reproduce.collect(arguments)
        assert [row["variant"] for row in result["cells"]] == [cell.variant]
        assert ("--part small" in result["command"]) == bool(extra)
        write_json(reproduce.find_result(arguments), result)
    assert {path.name for path in tmp_path.glob("*.json")} == {"reproduce_ml1m.json", "reproduce_ml1m_small.json"}
    page = tmp_path / "docs" / "results.md"
    write_page(page, tmp_path)
    sections = [line for line in page.read_text().splitlines() if line.startswith("## MovieLens")]
    assert sections == ["## MovieLens-1M", "## MovieLens-1M, part small"]
    assert page.read_text().count("### Published results") == 1
    assert "- Without the anchor: stage 2 (text + slots) (AUC 0.7000)" in page.read_text()


def test_a_result_of_one_seed_does_not_name_it(monkeypatch, tmp_path):
    arguments = parse(monkeypatch, tmp_path)
    write_cell(reproduce.find_records(arguments), OTHER, reproduce.list_settings(OTHER, arguments), 0.6)
    result = reproduce.collect(arguments)
    assert "--seeds" not in result["command"]
    assert summarize("ml1m", result)[0].startswith("Without the anchor: stage 2 (text + slots) (AUC")


def test_the_page_is_current(repository, tmp_path):
    write_page(tmp_path / "results.md", repository / "benchmarks" / "results")
    current = (repository / "docs" / "results.md").read_text(encoding="utf-8")
    assert current == (tmp_path / "results.md").read_text(encoding="utf-8"), "run python -m benchmarks.render_index"


def test_what_may_see_less_is_no_rival(monkeypatch, tmp_path):
    arguments = parse(monkeypatch, tmp_path)
    write_cell(reproduce.find_records(arguments), FULL, reproduce.list_settings(FULL, arguments), 0.6)
    result = reproduce.collect(arguments)
    row = result["rows"][-1]
    for inputs, is_shown in ((row["inputs"], True), ("ids alone", False)):
        pair = {**result["differences"][0], "model": "stage2", "versus": "cf"}
        rows = [*result["rows"], {**row, "model": "cf", "inputs": inputs}]
        found = summarize("ml1m", {**result, "rows": rows, "differences": [*result["differences"], pair]})
        assert any("the collaborative model" in sentence for sentence in found) == is_shown


def test_every_variant_has_a_name_and_a_base_that_exists():
    assert set(reproduce.VARIANTS) == set(DATA_SETS)
    for variants in reproduce.VARIANTS.values():
        assert next(iter(variants)) == "full"
        for name, (_, base) in variants.items():
            assert name in PARTS
            assert base is None or base in variants


def test_the_cost_of_the_leak_is_rendered_as_measured(repository):
    runs = json.loads((repository / "benchmarks" / "results" / "cross_fit_ml1m.json").read_text())["runs"]
    leak = "\n".join(render_leak(repository / "benchmarks" / "results"))
    assert f"{runs['0']['both']['test']['mean']:.4f}" in leak
    assert f"{runs['8']['both']['test']['mean']:.4f}" in leak
    assert render_leak(repository / "docs") == []


def test_ways_to_train_the_tables_are_rendered_as_measured(tmp_path):
    metrics = {key: {"mean": 0.7 + place / 100, "std": 0.001} for place, key in enumerate(("train", "valid", "test"))}
    metrics["test_uauc"] = {"mean": 0.65, "std": 0.002}
    assert render_tables(tmp_path) == []
    write_json(tmp_path / "tuned_tables_ml1m.json", {"seeds": 3, "runs": {"mf T2": metrics, "id tokens": metrics}})
    text = "\n".join(render_tables(tmp_path))
    assert "| MF, trained from scratch (T2) | 0.7000 ± 0.0010 | 0.7100 ± 0.0010 | 0.7200 ± 0.0010 |" in text
    assert "| id tokens, no CF model        |" in text


def test_ways_of_tuning_are_rendered_as_measured(tmp_path):
    assert render_title_tuning(tmp_path) == []
    history = [{"step": step, "auc": 0.5 + step / 100, "uauc": 0.6, "logloss": 0.7} for step in (1, 2)]
    ways = [
        {"name": name, "settings": json.loads(json.dumps(asdict(WAYS[name]))), "history": history}
        for name in ("base", "rank 8, q and v, 1e-3", "full, 2e-5")
    ]
    write_json(tmp_path / "title_tuning_ml1m.json", {"ways": ways})
    lines = render_title_tuning(tmp_path)[4].splitlines()
    names = [[cell.strip() for cell in line.split("|")[1:5]] for line in lines[2:]]
    assert names == [
        ["base", "LoRA of rank 16 on all linear layers, 0.0002", "0.510", "0.520"],
        ["rank 8, q and v, 1e-3", "LoRA of rank 8 on q and v, 0.001", "0.510", "0.520"],
        ["full, 2e-5", "all weights of the layers, 2e-05", "0.510", "0.520"],
    ]
