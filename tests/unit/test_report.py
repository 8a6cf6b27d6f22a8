"""Evaluation step on a hand-made run with only the data step done: report, plots, score files."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from collm_dist.cf.model_files import load_cf_model
from collm_dist.data.shards.interactions import load_interactions
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ArtifactError
from collm_dist.evaluation.calibration import compute_calibration, compute_calibration_error, count_drawn_bins
from collm_dist.evaluation.evaluated_rows import load_splits
from collm_dist.evaluation.model_scores import collect_models
from collm_dist.evaluation.plots import plot_calibration, plot_training, read_curves
from collm_dist.evaluation.report import build_report, run_evaluation
from collm_dist.evaluation.report_markdown import render_markdown, render_table
from collm_dist.evaluation.report_notes import estimate_standard_error
from collm_dist.evaluation.score_files import align_scores
from collm_dist.evaluation.simple_rivals import describe_proven_loss
from collm_dist.metrics import compute_auc, compute_ndcg, compute_uauc
from collm_dist.runs.atomic_files import write_json
from tests.unit.cf_data import fit_and_export, make_cf
from tests.unit.evaluation_run import build_config, write_data_step

ROW_KEYS = {
    *("model", "split", "slice", "rows", "users_counted", "logloss", "training_labels", "inputs"),
    *("auc", "auc_low", "auc_high", "uauc", "uauc_low", "uauc_high"),
}
TRIVIAL = ["item_mean", "item_user_mean", "bias_logistic", "as_of_logistic", "text_similarity", "blend"]


@pytest.fixture(scope="module")
def explicit(tmp_path_factory):
    path = tmp_path_factory.mktemp("explicit")
    run_dir = write_data_step(path)
    config = build_config(path, recipe="ML-1M")
    return config, run_dir, run_evaluation(config, run_dir)


def test_report_has_the_promised_rows(explicit):
    _, run_dir, report = explicit
    assert run_dir.read_record("eval") == report
    for row in report["rows"]:
        assert set(row) == ROW_KEYS
    of_test = [row for row in report["rows"] if (row["split"], row["slice"]) == ("test", "all")]
    assert [row["model"] for row in of_test] == TRIVIAL
    assert {row["slice"] for row in report["rows"]} == {"all", "warm", "cold_user", "cold_item"}
    assert set(report["left_out"]) == {"cf", "stage1", "stage2", "slots_without_llm", "slots_shuffled"}
    assert report["best_trivial"] in TRIVIAL
    assert report["fingerprint"]["upstream.data"] == load_manifest(run_dir.step_dir("data")).content_hash
    assert report["data"]["name"] == "ratings.csv"
    assert report["data"]["evaluated"]["test"]["rows"] == 100


def test_report_states_its_power_and_the_deviations(explicit):
    _, run_dir, report = explicit
    assert set(report["data"]["evaluated"]) == {"valid", "test"}
    assert any("only paired differences whose interval excludes 0" in warning for warning in report["warnings"])
    assert not any("Stage 2 was trained" in note or "Checkpoints were selected" in note for note in report["notes"])
    settings = {deviation["setting"] for deviation in report["deviations"]}
    assert {"preprocessing.ties", "llm.backbone", "prompt.stage2", "prompt.score"} <= settings
    text = (run_dir.step_dir("eval") / "report.md").read_text()
    for part in ("as-of logistic", "all earlier feedback", "cold item", "deviate from the paper's recipe", "not run"):
        assert part in text
    assert "paper's recipe" not in render_markdown({**report, "recipe": None, "deviations": []})
    for name in report["plots"]:
        assert (run_dir.step_dir("eval") / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text
    assert {"auc-test.png", "calibration-valid.png"} <= set(report["plots"])
    assert str(run_dir.path) not in text
    assert list((run_dir.step_dir("eval") / "tensorboard").iterdir())


def test_score_files_reproduce_the_table(explicit):
    _, run_dir, report = explicit
    expected = load_interactions(run_dir.step_dir("data"), ["row_id", "user_idx", "item_idx", "label"], split="test")
    for row in report["rows"]:
        if (row["split"], row["slice"]) != ("test", "all"):
            continue
        path = run_dir.step_dir("eval") / "scores" / f"{row['model']}-test.parquet"
        scores = pq.read_table(path).to_pydict()
        assert sorted(expected["row_id"].tolist()) == scores["row_id"]
        by_id = np.argsort(expected["row_id"])
        for name in ("user_idx", "item_idx", "label"):
            assert expected[name][by_id].tolist() == scores[name]
        assert row["auc"] == pytest.approx(compute_auc(scores["label"], scores["score"]), abs=1e-12)
        value, num_users = compute_uauc(scores["label"], scores["score"], scores["user_idx"])
        assert (row["uauc"], row["users_counted"]) == (pytest.approx(value, abs=1e-12), num_users)


def test_a_rerun_is_skipped_a_change_is_refused_and_force_repeats(explicit, capsys):
    config, run_dir, report = explicit
    before = run_dir.record_path("eval").stat().st_mtime_ns
    assert run_evaluation(config, run_dir) == json.loads(json.dumps(report))
    assert "up to date" in capsys.readouterr().out
    assert run_dir.record_path("eval").stat().st_mtime_ns == before
    changed = build_config(run_dir.path, confidence=0.5)
    with pytest.raises(ArtifactError, match=r"evaluation\.confidence"):
        run_evaluation(changed, run_dir)
    stale = run_dir.step_dir("eval") / "scores" / "gone-test.parquet"
    stale.write_bytes(b"")
    again = run_evaluation(config, run_dir, force=True)
    assert not stale.exists()
    assert len(list((run_dir.step_dir("eval") / "tensorboard").iterdir())) == 1
    assert again["content_hash"] == report["content_hash"]
    output = capsys.readouterr().out
    assert "tensorboard --logdir" in output
    assert "| bias logistic" in output


def test_fewer_users_are_the_same_for_all_models(tmp_path):
    run_dir = write_data_step(tmp_path)
    report = run_evaluation(build_config(tmp_path, max_users=5, splits=("test",), bootstrap_samples=0), run_dir)
    assert {row["rows"] for row in report["rows"] if row["slice"] == "all"} == {
        report["data"]["evaluated"]["test"]["rows"]
    }
    assert report["data"]["evaluated"]["test"]["users"] == 5
    assert report["rows"][0]["auc_low"] is None
    assert any("5 users, chosen by hash" in note for note in report["notes"])
    assert any("fixed in advance" in note for note in report["notes"])


def test_clicks_are_ranked(tmp_path):
    run_dir = write_data_step(tmp_path, "implicit")
    report = run_evaluation(build_config(tmp_path, feedback="implicit"), run_dir)
    of_test = {row["model"]: row for row in report["rows"] if (row["split"], row["slice"]) == ("test", "all")}
    assert list(of_test) == ["popularity", "last_item_cooccurrence", "text_similarity", "blend"]
    row = of_test["popularity"]
    assert row["logloss"] is None
    assert set(row) >= {"ndcg@1", "ndcg@2_low", "hr@2", "lists", *ROW_KEYS}
    assert row["lists"] * 4 == row["rows"]
    scores = pq.read_table(run_dir.step_dir("eval") / "scores" / "popularity-test.parquet").to_pydict()
    rows = load_interactions(run_dir.step_dir("data"), ["row_id", "group_id", "item_likes"], split="test")
    group = dict(zip(rows["row_id"].tolist(), rows["group_id"].tolist(), strict=True))
    expected = compute_ndcg(scores["label"], scores["score"], [group[row] for row in scores["row_id"]], 2)
    assert row["ndcg@2"] == pytest.approx(expected, abs=1e-12)
    assert any("Dislikes are sampled" in note for note in report["notes"])
    # The lists have more dislikes for each like than the training rows that probabilities were fitted to.
    assert of_test["blend"]["logloss"] is None
    assert report["calibration"] == []
    assert not [name for name in report["plots"] if name.startswith("calibration")]
    assert "log-loss" not in (run_dir.step_dir("eval") / "report.md").read_text()
    assert "NDCG@2" in (run_dir.step_dir("eval") / "report.md").read_text()


def test_scores_must_be_complete_unique_and_finite():
    expected_ids = np.array([5, 3, 9])
    assert align_scores(expected_ids, np.array([3, 5, 9]), np.array([0.3, 0.5, 0.9]), "a").tolist() == [0.5, 0.3, 0.9]
    for row_ids, scores in (([3, 5], [1, 2]), ([3, 5, 5, 9], [1, 2, 2, 3]), ([3, 5, 9], [1, np.nan, 2])):
        with pytest.raises(ArtifactError, match="stage1 on test"):
            align_scores(expected_ids, np.array(row_ids), np.array(scores, dtype=float), "stage1 on test")


def test_standard_error_without_intervals():
    row = {"auc": 0.7, "auc_low": None, "auc_high": None, "rows": 500}
    assert estimate_standard_error(row, 250, 0.95) == pytest.approx(0.023, abs=0.001)
    assert estimate_standard_error(row, 500, 0.95) is None
    assert estimate_standard_error({**row, "auc_low": 0.65, "auc_high": 0.75}, 250, 0.95) == pytest.approx(
        0.0255, abs=1e-4
    )


def test_calibration_of_true_probabilities():
    random = np.random.default_rng(0)
    probability = random.uniform(size=20000)
    labels = (random.uniform(size=20000) < probability).astype(int)
    logits = np.log(probability / (1 - probability))
    bins = compute_calibration(labels, logits)
    assert [bin_.rows for bin_ in bins] == [2000] * 10
    assert [bin_.observed for bin_ in bins] == pytest.approx([bin_.predicted for bin_ in bins], abs=0.04)
    assert compute_calibration_error(bins) < 0.02
    # Twice as far from even odds as it should be: too sure at both ends.
    sure = compute_calibration(labels, 2 * logits)
    assert sure[0].predicted < sure[0].observed
    assert sure[-1].predicted > sure[-1].observed
    assert compute_calibration_error(sure) > 0.08


def test_calibration_error_by_hand():
    bins = compute_calibration(
        np.array([0, 1, 1, 1]), np.log(np.array([0.25, 0.5, 0.5, 0.75]) / [0.75, 0.5, 0.5, 0.25])
    )
    assert [(bin_.rows, bin_.predicted, bin_.observed) for bin_ in bins] == [
        (1, pytest.approx(0.25), 0), (1, pytest.approx(0.5), 1), (1, pytest.approx(0.5), 1), (1, pytest.approx(0.75), 1)
    ]  # fmt: skip
    assert compute_calibration_error(bins) == pytest.approx(0.375)


def test_calibration_does_not_depend_on_the_order_of_equal_scores():
    labels, logits = np.arange(400) % 2, np.repeat([-1.0, 1.0], 200)
    order = np.lexsort([labels, logits])
    bins = compute_calibration(labels, logits)
    assert compute_calibration(labels[order], logits[order]) == bins
    assert {bin_.observed for bin_ in bins} == {0.5}


@pytest.mark.parametrize(("steps", "taken_from", "found"), [(3, None, False), (4, None, True), (4, "/earlier", False)])
def test_training_rows_are_scored_once_stage_1_has_seen_them(tmp_path, steps, taken_from, found):
    run_dir = write_data_step(tmp_path)
    config = build_config(tmp_path, splits=("test",))
    record = {"train_rows": 4 * config.stage1.global_batch_size, "best_valid": {"step": steps}, "global_steps": 9,
              "taken_from": taken_from, "content_hash": "one"}  # fmt: skip
    write_json(run_dir.record_path("stage1"), record)
    splits = load_splits(config, run_dir, load_manifest(run_dir.step_dir("data")))
    assert list(splits) == (["test", "train"] if found else ["test"])


@pytest.mark.parametrize(("rows", "bins"), [(2, 3), (119, 3), (288, 7), (400, 10), (9000, 10)])
def test_few_rows_are_drawn_in_few_bins(rows, bins):
    assert count_drawn_bins(rows) == bins


def test_calibration_is_drawn_in_a_panel_per_model():
    labels, logits = np.arange(80) % 2, np.linspace(-3, 3, 80)
    figure = plot_calibration(
        labels, {f"model {number}": number + logits for number in range(5)}, "Calibration on test"
    )
    assert figure.get_suptitle() == "Calibration on test: 3 bins of about 26 rows, bars of one standard error"
    drawn = [axes for axes in figure.axes if axes.has_data()]
    assert [axes.get_title().split("\n")[0] for axes in drawn] == [f"model {number}" for number in range(5)]
    error = compute_calibration_error(compute_calibration(labels, logits))
    assert drawn[0].get_title().endswith(f"error {error:.3f}")
    assert len(drawn[0].lines[1].get_xdata()) == 3


def test_calibration_is_in_the_report(explicit):
    _, run_dir, report = explicit
    assert {curve["split"] for curve in report["calibration"]} == {"valid", "test"}
    text = (run_dir.step_dir("eval") / "report.md").read_text()
    with (run_dir.step_dir("eval") / "calibration.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == sum(len(curve["bins"]) for curve in report["calibration"])
    for curve in report["calibration"]:
        assert (
            sum(bin_values["rows"] for bin_values in curve["bins"])
            == report["data"]["evaluated"][curve["split"]]["rows"]
        )
        assert f"{curve['error']:.4f}" in text
        ours = [row for row in written if (row["split"], row["model"]) == (curve["split"], curve["model"])]
        assert [float(row["observed"]) for row in ours] == pytest.approx(
            [f["observed"] for f in curve["bins"]], abs=1e-6
        )


def test_training_curves_survive_a_crash_in_the_last_line(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "train/loss": 0.7}\n{"step": 2, "train/loss": 0.6, "valid/auc": 0.5}\n{"step": 3, "tr')
    assert read_curves(log) == {"train/loss": ([1, 2], [0.7, 0.6]), "valid/auc": ([2], [0.5])}
    assert plot_training({"stage1": log}) is not None
    assert plot_training({"stage1": tmp_path / "none.jsonl"}) is None


def test_tables_are_aligned():
    lines = render_table(["model", "AUC"], [["a", "0.5"], ["longer name", "-"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "|:------------|----:|"


def test_stages_are_compared_with_the_slots_alone_and_with_shuffled_slots(tmp_path):
    """Scores of the stages are made up; the slots without LLM are really fitted."""
    run_dir = write_data_step(tmp_path)
    config = build_config(tmp_path)
    prompt = config.prompt.model_copy(update={"stage2": "<ItemTitleList> <TargetItemTitle> <MatchID> Answer:"})
    config = config.model_copy(update={"prompt": prompt})
    seen = {"train_rows": 400, "best_valid": {"step": 400 // config.stage1.global_batch_size + 1}}
    write_json(run_dir.record_path("stage1"), {"global_steps": 5, "content_hash": "one", **seen})
    write_json(run_dir.record_path("stage2"), {"global_steps": 9, "content_hash": "two"})
    manifest = load_manifest(run_dir.step_dir("data"))
    splits = load_splits(config, run_dir, manifest)
    random = np.random.default_rng(0)
    stage_scores = {
        (name, split): splits[split].rows.label * strength + random.normal(size=len(splits[split].rows.label))
        for name, strength in (("stage1", 0.2), ("stage2", 3.0), ("slots_shuffled", 0.1))
        for split in splits
        if (name, split) not in (("stage2", "train"), ("slots_shuffled", "train"))
    }
    scores = collect_models(config, run_dir, manifest, splits, stage_scores)
    assert scores.left_out == {"cf": "the step 'cf' has not run"}
    report = build_report(config, manifest, splits, scores)
    of_all = {(row["split"], row["model"]): row for row in report["rows"] if row["slice"] == "all"}
    assert [model for split, model in of_all if split == "test"] == [
        *TRIVIAL,
        "slots_without_llm",
        "stage1",
        "stage2",
        "slots_shuffled",
    ]
    assert [key for key in of_all if key[0] == "train"] == [("train", "stage1")]
    assert of_all["test", "slots_without_llm"]["auc"] > 0.6
    assert of_all["test", "stage1"]["inputs"] == "earlier likes"
    assert of_all["test", "stage2"]["inputs"] == "all earlier feedback"
    of_test = [row for row in report["differences"] if (row["split"], row["slice"]) == ("test", "all")]
    gain = {row["versus"]: row for row in of_test if row["model"] == "stage2"}
    assert set(gain) == {"blend", "slots_without_llm", "slots_shuffled", "stage1", report["best_trivial"]}
    assert gain["slots_shuffled"]["auc_low"] > 0
    expected = of_all["test", "stage2"]["auc"] - of_all["test", "stage1"]["auc"]
    assert gain["stage1"]["auc"] == pytest.approx(expected, abs=1e-12)
    assert any("on its training rows" in note for note in report["notes"])
    assert "stage 2 (text + slots) vs slots without LLM" in render_markdown({**report, "plots": []})


def test_a_stage_2_below_its_anchor_is_reported():
    row = {"split": "test", "slice": "all", "model": "stage2", "versus": "blend", "rows": 900, "auc": -0.02,
           "auc_low": -0.03, "auc_high": -0.01}  # fmt: skip
    report = {"anchor": "blend", "differences": [row]}
    assert describe_proven_loss(report, "auc").startswith(
        "stage 2 is proven worse than its anchor: auc -0.0200 [-0.0300, -0.0100] on 900 rows of test."
    )
    assert describe_proven_loss({**report, "differences": [row | {"auc_high": 0.001}]}, "auc") is None
    assert describe_proven_loss({**report, "differences": [row | {"versus": "cf"}]}, "auc") is None
    assert describe_proven_loss({**report, "differences": [row | {"auc_high": None}]}, "auc") is None


def test_collaborative_model_is_scored_and_feeds_the_slots_alone(tmp_path):
    run_dir = write_data_step(tmp_path)
    config = build_config(tmp_path, splits=("test",))
    manifest = load_manifest(run_dir.step_dir("data"))
    fit_and_export(run_dir, make_cf("mf"), tmp_path / "states")
    write_json(run_dir.record_path("cf"), {"content_hash": "vectors"})
    write_json(run_dir.record_path("stage2"), {"global_steps": 2, "content_hash": "two"})
    splits = load_splits(config, run_dir, manifest)
    models = {model.name: model for model in collect_models(config, run_dir, manifest, splits, {}).models["test"]}
    block = splits["test"].block
    users = torch.from_numpy(block.user_idx[block.target_contexts])
    history = torch.full((len(users), manifest.max_history_length), -1)
    for row, context in enumerate(block.target_contexts):
        liked = block.history_items[block.history_offsets[context] : block.history_offsets[context + 1]]
        history[row, history.shape[1] - len(liked) :] = torch.from_numpy(liked)
    expected = load_cf_model(run_dir, manifest).score(users, history, torch.from_numpy(block.item_idx))
    assert len(set(expected.tolist())) > 50
    assert models["cf"].scores == pytest.approx(expected.numpy(), abs=1e-6)
    assert np.isfinite(models["slots_without_llm"].scores).all()
