"""Variants in which stage 2 also trains the CF model: training, report, ranking and export."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

import collm_dist
from collm_dist import RankingRequest
from collm_dist.cf.cross_fit import fit_job
from collm_dist.cf.jobs import Job
from collm_dist.cf.model_export import export_models
from collm_dist.config.loader import dump_config, load_config
from collm_dist.data.shards.interactions import load_interactions, load_item_table, load_user_ids
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.errors import ConfigError, Preempted, RequestError
from collm_dist.evaluation.report import run_evaluation
from collm_dist.orchestration.pretrain import run_pretrain
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.licences import Licences
from collm_dist.tuning.run_stage import run_stage
from tests.conftest import REPOSITORY
from tests.unit.evaluation_run import NUM_ITEMS, write_data_step

pytestmark = pytest.mark.usefixtures("same_environment")

# Float32 sums in another order.
TOLERANCE = 1e-5
VARIANTS = {
    "T1": ["cf.model=mf", "stage2.train_cf=true"],
    "T2": ["cf.model=din", "stage2.train_cf=scratch"],
    "id tokens": ["cf.model=none", "stage2.train_cf=scratch"],
}


def prepare(folder, finished_run, overrides):
    """Return (config, run directory): data and stage 1 are the finished run's, the CF step is rerun."""
    base = load_config(finished_run / "config.yaml")
    config = load_config(
        REPOSITORY / "configs" / "tiny_cpu.yaml",
        [f"run.dir={folder}", f"dataset.path={base.dataset.path}", f"dataset.items_path={base.dataset.items_path}",
         f"llm.backbone={base.llm.backbone}", "evaluation.splits=[valid,test]", "evaluation.recipe=ML-1M", *overrides],
    )  # fmt: skip
    run_dir = RunDir(folder)
    run_dir.path.mkdir()
    for name in ("data", "stage1"):
        run_dir.step_dir(name).symlink_to(finished_run / name, target_is_directory=True)
    (run_dir.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    if config.cf.model == "none":
        run_pretrain(config, run_dir)
    else:
        fit_cf(config, run_dir)
    return config, run_dir


def fit_cf(config, run_dir):
    """Do the CF step on this process, without Ray."""
    data_dir = run_dir.step_dir("data")
    job = Job(data_dir, run_dir.path / "states", "key", config.cf, config.run.seed)
    fit_job(job, torch.device("cpu"), 0, 1, lambda *_: None)
    content_hash = export_models(job, run_dir.step_dir("cf"), load_manifest(data_dir))
    fingerprint = compute_step_fingerprint(config, run_dir, "cf")
    write_json(run_dir.record_path("cf"), {"content_hash": content_hash, "fingerprint": fingerprint})


@pytest.fixture(scope="module", params=VARIANTS)
def finished(request, finished_run, tmp_path_factory):
    config, run_dir = prepare(tmp_path_factory.mktemp("variant") / "run", finished_run, VARIANTS[request.param])
    run_stage(config, run_dir, "stage2")
    return request.param, config, run_dir, run_evaluation(config, run_dir)


def load_weights(run_dir):
    return safetensors.torch.load_file(run_dir.step_dir("stage2") / "mapping.safetensors")


def test_tables_move_and_the_report_says_so(finished):
    variant, config, run_dir, report = finished
    weights, start = load_weights(run_dir), safetensors.torch.load_file(run_dir.step_dir("cf") / "model.safetensors")
    moved = weights["cf_model.models.0.items.weight"]
    assert moved.shape == start["items.weight"].shape
    assert not torch.equal(moved, start["items.weight"])
    assert "cf_model.models.0.global_bias" not in weights
    models = {row["model"] for row in report["rows"]}
    assert {"stage2", "slots_without_llm", "slots_shuffled", "stage1"} <= models
    assert ("cf" in models) is (variant != "id tokens")
    assert report["left_out"] == ({"cf": "cf.model is none"} if variant == "id tokens" else {})
    assert any("trained in stage 2 too" in note for note in report["notes"])
    deviations = {entry["setting"]: entry["ours"] for entry in report["deviations"]}
    assert deviations["stage2.train_cf"] == str(config.stage2.train_cf).lower()
    assert deviations.get("cf.model") == ("none" if variant == "id tokens" else None)


def test_ranking_has_the_scores_of_the_report_also_after_an_export(finished, tmp_path):
    variant, config, run_dir, _ = finished
    users = load_user_ids(run_dir.step_dir("data"))
    items = load_item_table(run_dir.step_dir("data"))["item_id"]
    scored = pq.read_table(run_dir.path / "eval" / "scores" / "stage2-test.parquet").slice(0, 40).to_pydict()
    log = load_interactions(run_dir.step_dir("data"), ("row_id", "timestamp"))
    times = dict(zip(log["row_id"].tolist(), log["timestamp"].tolist(), strict=True))
    requests = [
        RankingRequest(users[user], None, [items[item]], times[row])
        for user, item, row in zip(scored["user_idx"], scored["item_idx"], scored["row_id"], strict=True)
    ]
    recommender = collm_dist.load_recommender(run_dir.path, device="cpu")
    scores = np.concatenate(recommender.score(requests))
    assert np.abs(scores - np.array(scored["score"])).max() < TOLERANCE
    export_model(config, run_dir, tmp_path / "export", Licences("a", "b", "c"))
    imported = import_model(tmp_path / "export", RunDir(tmp_path / "imported"))
    again = np.concatenate(collm_dist.load_recommender(imported.path, device="cpu").score(requests))
    np.testing.assert_array_equal(again, scores)
    nobody = recommender.rank(history=["3", "17"], candidates=["41", "42"])  # a user whom no table knows
    assert all(np.isfinite(entry.score) for entry in nobody)
    if variant == "id tokens":
        with pytest.raises(RequestError, match="no collaborative model"):
            recommender.rank(history=["3"])
    else:
        assert len(recommender.rank(history=["3"], num_retrieved=4)) == 4


@pytest.mark.parametrize("variant", ["T1", "id tokens"])
def test_a_stopped_stage_goes_on_as_if_nothing_had_been(finished_run, tmp_path, variant):
    config, run_dir = prepare(tmp_path / "whole", finished_run, VARIANTS[variant])
    run_stage(config, run_dir, "stage2")
    config, stopped = prepare(tmp_path / "stopped", finished_run, VARIANTS[variant])
    stop = threading.Event()
    stop.set()
    with pytest.raises(Preempted):
        run_stage(config, stopped, "stage2", stop=stop)
    run_stage(config, stopped, "stage2")
    expected, found = load_weights(run_dir), load_weights(stopped)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def prepare_small(folder, backbone, overrides):
    """Return (config, run directory) of a few hundred rows, without stage 1, with the CF step done."""
    config = load_config(
        REPOSITORY / "configs" / "tiny_cpu.yaml",
        [f"run.dir={folder}", f"llm.backbone={backbone}", "stage1.enabled=false", "cf.num_epochs=1", *overrides],
    )
    run_dir = write_data_step(folder)
    texts = [f"film {number}" for number in range(NUM_ITEMS)]
    items = {"item_idx": range(NUM_ITEMS), "item_id": texts, "title": texts, "text": texts}
    pq.write_table(pa.table(items), run_dir.step_dir("data") / "items.parquet")
    if config.cf.model == "none":
        run_pretrain(config, run_dir)
    else:
        fit_cf(config, run_dir)
    return config, run_dir


@pytest.mark.parametrize("model", ["mf", "sasrec"])
def test_tables_train_in_half_precision_under_zero_2(tiny_backbone_dir, tmp_path, model):
    settings = [f"cf.model={model}", "stage2.train_cf=true", "llm.dtype=bfloat16", "cluster.zero_stage=2"]
    config, run_dir = prepare_small(tmp_path, tiny_backbone_dir, settings)
    summary = run_stage(config, run_dir, "stage2")
    assert summary["global_steps"] == 4
    assert all(torch.isfinite(value).all() for value in load_weights(run_dir).values())


def test_training_a_model_that_no_slot_reads_is_refused(tiny_backbone_dir, tmp_path):
    prompt = 'prompt.stage2="Like <TargetItemTitle> <MatchID>? Answer:"'
    config, run_dir = prepare_small(tmp_path, tiny_backbone_dir, [*VARIANTS["id tokens"], prompt])
    with pytest.raises(ConfigError, match=r"no slot of prompt\.stage2 reads"):
        run_stage(config, run_dir, "stage2")
