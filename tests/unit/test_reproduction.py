"""Records of the reproduction's cells, and the page rendered from them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import reproduce_ml1m
from benchmarks.lib.reproduction_page import write_page
from benchmarks.lib.reproduction_parts import render_leak, render_llm_share, render_tables
from benchmarks.lib.reproduction_records import Cell, compare_cells, read_record
from collm_dist.metrics import compute_auc
from collm_dist.runs.atomic_files import write_json

BASE, CELL = Cell("mf", "stage2", 0), Cell("mf", "pair", 0)


def write_cell(folder, cell, settings, auc):
    common = {"model": "stage2", "split": "test", "slice": "all", "rows": 40}
    row = {**common, "users_counted": 8, "auc": auc, "auc_low": 0.5, "auc_high": 0.9, "uauc": auc, "uauc_low": 0.5,
           "uauc_high": 0.9, "logloss": 0.6, "training_labels": "all", "inputs": "likes"}  # fmt: skip
    difference = {**common, "versus": "slots_without_llm", "auc": -0.01, "auc_low": -0.05, "auc_high": 0.03,
                  "uauc": 0.0, "uauc_low": None, "uauc_high": None}  # fmt: skip
    record = {"cf": cell.cf, "variant": cell.variant, "seed": cell.seed, "settings": settings, "seconds": 60.0,
              "precision": "float32",
              "hardware": {"cpus": 2}, "versions": {}, "warnings": [], "rows": [row], "differences": [difference],
              "against": None}  # fmt: skip
    write_json(cell.find_record(folder), record)


def write_run(folder, cell, scores, labels):
    columns = {"row_id": range(len(labels)), "user_idx": np.arange(len(labels)) // 5, "item_idx": range(len(labels))}
    path = cell.find_run(folder) / "eval" / "scores" / "stage2-test.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns | {"label": labels.astype(np.int8), "score": scores}), path)


def parse(monkeypatch, tmp_path, *extra):
    arguments = [
        "reproduce",
        "--data",
        str(tmp_path),
        "--work",
        str(tmp_path / "runs"),
        "--output",
        str(tmp_path),
        *extra,
    ]
    monkeypatch.setattr("sys.argv", arguments)
    return reproduce_ml1m.parse_arguments()


def test_records_count_without_their_runs_while_settings_are_the_same(monkeypatch, tmp_path):
    arguments = parse(monkeypatch, tmp_path, "--cells", "mf/pair")
    folder = reproduce_ml1m.find_records(arguments)
    for cell, auc in ((BASE, 0.6), (CELL, 0.7)):
        write_cell(folder, cell, reproduce_ml1m.list_settings(cell, arguments), auc)
    result = reproduce_ml1m.collect(arguments)  # all of the profile's, though one is chosen
    assert [(row["variant"], row["auc"], row["seeds"]) for row in result["rows"]] == [
        ("stage2", 0.6, [0]),
        ("pair", 0.7, [0]),
    ]
    assert set(result["not_run"]) >= {"din/stage2/0", "din/pair/0"}
    assert "mf/pair/0" not in result["not_run"]
    other = parse(monkeypatch, tmp_path, "--overrides", "evaluation.max_users=7")
    assert read_record(CELL, folder, reproduce_ml1m.list_settings(CELL, other)) is None


def test_a_part_is_compared_with_the_cell_that_lacks_it(monkeypatch, tmp_path):
    arguments = parse(monkeypatch, tmp_path)
    records, runs, random = reproduce_ml1m.find_records(arguments), tmp_path / "runs", np.random.default_rng(0)
    labels = random.integers(0, 2, 200)
    weak, strong = random.normal(size=200), labels + 0.5 * random.normal(size=200)
    for cell, scores in ((BASE, weak), (CELL, strong)):
        write_cell(records, cell, reproduce_ml1m.list_settings(cell, arguments), 0.6)
        write_run(runs, cell, scores, labels)
    compare_cells(BASE, records, runs)
    compare_cells(CELL, records, runs)
    assert json.loads(BASE.find_record(records).read_text())["against"] is None
    against = json.loads(CELL.find_record(records).read_text())["against"]
    assert against["auc"] == compute_auc(labels, strong) - compute_auc(labels, weak)
    assert 0 < against["auc_low"] < against["auc"] < against["auc_high"]
    assert against["versus"] == "mf/stage2"
    page = tmp_path / "docs" / "results.md"
    for profile in ("cpu", "slots"):
        result = reproduce_ml1m.collect(arguments) | {"profile": profile}
        write_json(tmp_path / f"reproduce_ml1m_{profile}.json", result)
    write_page(page, tmp_path)
    text = page.read_text()
    assert "| MF: pair slot: as-of statistics of user and item |" in text
    assert "**no gain from the language model can be seen**" in text
    without_titles = " ".join(text[text.index("### Without titles") :].split())
    assert "| MF, also the pair slot | - | - | 0.6000 [0.500, 0.900] |" in without_titles
    assert "Not run yet: mf/pair_cross_fit/0" in text
    assert (tmp_path / "docs" / "images" / "reproduction_cpu_auc.png").stat().st_size > 5000


def test_the_language_models_share_and_the_leak_are_rendered_as_measured(repository):
    differences = [
        {"cf": "din", "variant": "stage2", "model": "stage2", "versus": "slots_without_llm", "auc": auc,
         "auc_low": auc - 0.01, "auc_high": auc + 0.01}
        for auc in (0.05, -0.05)
    ]  # fmt: skip
    above, below = (line for line in render_llm_share(differences) if line.startswith("- "))
    assert "adds to its slots (AUC +0.0500 [+0.040, +0.060]" in above
    assert "**the language model takes away from its slots**" in below
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


def test_the_gpu_profile_has_twelve_cells_and_several_seeds_of_the_best():
    cells = reproduce_ml1m.PROFILES["gpu"][0]
    assert len(set(cells)) == len(cells) <= 12
    assert len([cell for cell in cells if cell[:2] == cells[0][:2]]) == 3
    for cf, variant, _ in [cell for cells, _ in reproduce_ml1m.PROFILES.values() for cell in cells]:
        assert cf in reproduce_ml1m.CONFIGS
        assert variant in reproduce_ml1m.VARIANTS
