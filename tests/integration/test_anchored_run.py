"""A run with an anchor: training starts at the anchor, and every way of scoring adds the same one."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import collm_dist
from collm_dist import RankingRequest
from collm_dist.anchor import load_anchor, prepare_anchor
from collm_dist.config.loader import dump_config, load_config
from collm_dist.data.shards.context_block import concatenate_blocks
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.interactions import load_interactions, load_item_table, load_user_ids
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ArtifactError
from collm_dist.metrics import compute_auc, compute_logloss, compute_uauc
from collm_dist.orchestration.pipeline import run_pipeline
from collm_dist.runs.publish import Publisher
from collm_dist.runs.reuse import link_step
from collm_dist.runs.run_dir import STAGES, STEPS, RunDir
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.licences import Licences
from collm_dist.serving.requests import RankingQuery
from collm_dist.tuning.run_stage import build_orders, run_stage
from collm_dist.tuning.stage import get_stage
from collm_dist.tuning.step_batches import iter_step_batches
from tests.integration.ranking_service import serving

# Float32 sums in another order: the largest measured difference is 1e-6, at scores of about 1.
TOLERANCE = 1e-5


def load_config_of(run):
    return load_config(run / "config.yaml")


def read_scored(run, model):
    return pa.concat_tables(
        [pq.read_table(run / "eval" / "scores" / f"{model}-{split}.parquet") for split in ("valid", "test")]
    ).to_pydict()


def build_requests(run, scored):
    """Return the scored rows as requests at the time of the row."""
    users, items = load_user_ids(run / "data"), load_item_table(run / "data")["item_id"]
    log = load_interactions(run / "data", ("row_id", "timestamp"))
    times = dict(zip(log["row_id"].tolist(), log["timestamp"].tolist(), strict=True))
    return [
        RankingRequest(users[user], None, [items[item]], times[row])
        for user, item, row in zip(scored["user_idx"], scored["item_idx"], scored["row_id"], strict=True)
    ]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_step_0_is_the_anchor(anchored_run, stage):
    config = load_config_of(anchored_run)
    manifest, settings = load_manifest(anchored_run / "data"), getattr(config, stage)
    order = GlobalOrder(
        anchored_run / "data",
        manifest,
        "valid",
        config.run.seed,
        64,
        max_contexts=settings.max_valid_contexts,
        shuffle=False,
    )
    block = concatenate_blocks(list(order.iter_batches()))
    anchors = load_anchor(config, RunDir(anchored_run)).score(block)
    users = block.user_idx[block.target_contexts]
    lines = [json.loads(line) for line in (anchored_run / stage / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "valid/auc" in line)
    assert first["step"] == 0
    assert first["valid/auc"] == compute_auc(block.label, anchors)
    assert first["valid/uauc"] == compute_uauc(block.label, anchors, users)[0]
    assert first["valid/logloss"] == pytest.approx(compute_logloss(block.label, anchors), abs=1e-6)
    last = [line for line in lines if "valid/logloss" in line][-1]
    assert last["valid/logloss"] != first["valid/logloss"]  # the language model has a share by then


@pytest.fixture(scope="module")
def anchored_clicks(finished_clicks_run, tmp_path_factory):
    """A run of the clicks before its stages, with an anchor of counts; stage 1 is linked for stage 2 to start from."""
    run_dir = RunDir(tmp_path_factory.mktemp("anchored-clicks"))
    config = load_config(finished_clicks_run / "config.yaml", [f"run.dir={run_dir.path}", "anchor.kind=as_of"])
    (run_dir.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    for step in ("data", "cf", "stage1"):
        link_step(step, RunDir(finished_clicks_run), run_dir)
    prepare_anchor(config, run_dir)
    return run_dir.path


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fixture", ["anchored_run", "anchored_clicks"])
def test_the_untrained_model_scores_as_the_anchor_does(request, fixture, stage):
    run_dir = RunDir(request.getfixturevalue(fixture))
    config = load_config_of(run_dir.path)
    built, anchor = get_stage(config, stage), load_anchor(config, run_dir)
    loaded = built.build(run_dir, torch.device("cpu"))
    built.warm_start(loaded)
    model = loaded.model
    _, valid_order = build_orders(config, run_dir, built.settings)
    for collator, is_training in ((loaded.collator, True), (loaded.scoring_collator, False)):
        model.train(is_training)
        for step_batch in iter_step_batches(valid_order.iter_batches(), collator, 2048, loaded.device):
            expected = dict(zip(step_batch.block.row_id.tolist(), anchor.score(step_batch.block), strict=True))
            for batch in step_batch.micro_batches:
                with torch.no_grad():
                    scores = model(batch)
                    model.anchored_score.gain.fill_(1.0)
                    others = model(batch)
                    model.anchored_score.gain.zero_()
                is_real = batch.weights > 0
                assert scores.tolist() == batch.anchors.tolist()
                assert scores[is_real].tolist() == [expected[row] for row in batch.row_ids[is_real].tolist()]
                assert (others[is_real] != scores[is_real]).all()  # the language model has something to say
        assert len(set(expected.values())) > 1


def test_requests_get_the_scores_of_the_report(anchored_run):
    recommender = collm_dist.load_recommender(anchored_run, device="cpu")
    scored = read_scored(anchored_run, "stage2")
    scores = np.concatenate(recommender.score(build_requests(anchored_run, scored)))
    difference = np.abs(scores - np.array(scored["score"])).max()
    print("largest difference", difference, "of", len(scores), "rows")
    assert len(scores) > 400
    assert difference < TOLERANCE


@pytest.mark.parametrize("max_tokens", [None, 256], ids=["one pass", "several micro-batches"])
def test_the_parts_of_a_score_add_up(anchored_run, max_tokens):
    recommender = collm_dist.load_recommender(anchored_run, device="cpu")
    if max_tokens is not None:
        recommender._scorer._max_tokens = max_tokens
    for query in (RankingQuery(history=["3", "17", "40"], num_retrieved=40), RankingQuery(user="7", num_retrieved=30)):
        items = recommender.compare(query).items
        for item in items:
            assert item.anchor.score + item.llm + item.bias == item.language_model.score  # exactly
        assert len({item.bias for item in items}) == 1
        # The shares are those of the model: without its gain, the language model says nothing.
        model = recommender._scorer._loaded.model
        gain = model.anchored_score.gain.detach().clone()
        model.anchored_score.gain.data.zero_()
        silent = {item.item_id: item for item in recommender.compare(query).items}
        model.anchored_score.gain.data.copy_(gain)
        for item in items:
            assert abs(silent[item.item_id].llm) < 1e-6
            assert silent[item.item_id].anchor.score == item.anchor.score
        assert max(abs(item.llm) for item in items) > 1e-4
    block = recommender._reader.build_block(
        [recommender._reader.read_user(RankingRequest("7"))], [np.arange(len(recommender.item_ids))]
    )
    anchors = load_anchor(load_config_of(anchored_run), RunDir(anchored_run)).score(block)
    by_id = dict(zip(recommender.item_ids, anchors.tolist(), strict=True))
    assert max(abs(by_id[item.item_id] - item.anchor.score) for item in items) < TOLERANCE


def test_an_exported_model_takes_its_anchor_along(anchored_run, tmp_path):
    config = load_config_of(anchored_run)
    export_model(config, RunDir(anchored_run), tmp_path / "export", Licences("apache-2.0", "apache-2.0", "made up"))
    import_model(tmp_path / "export", RunDir(tmp_path / "imported"))
    requests = [RankingRequest("7", None, ["3", "17", "40"]), RankingRequest(None, ["3"], ["5", "6"])]
    expected = collm_dist.load_recommender(anchored_run, device="cpu").score(requests)
    scores = collm_dist.load_recommender(tmp_path / "imported", device="cpu").score(requests)
    np.testing.assert_array_equal(np.concatenate(scores), np.concatenate(expected))


def test_the_report_compares_with_the_anchor(anchored_run):
    report = json.loads((anchored_run / "eval" / "report.json").read_text())
    assert report["anchor"] == "blend"
    compared = {(row["model"], row["versus"]) for row in report["differences"] if row["split"] == "test"}
    assert {("stage1", "blend"), ("stage2", "blend")} <= compared
    inputs = {row["model"]: row["inputs"] for row in report["rows"]}
    assert inputs["stage1"] == inputs["blend"] == "all earlier feedback"


def test_a_published_run_has_the_anchor(anchored_run, tmp_path):
    publisher = Publisher(str(tmp_path / "published"), RunDir(anchored_run), show_progress=False)
    publisher.publish_file("config.yaml")
    for step in ("data", "cf", "stage1", "stage2"):
        publisher.publish_step(step)
    ours, theirs = (collm_dist.load_recommender(run, "cpu") for run in (anchored_run, tmp_path / "published"))
    request = RankingRequest(None, ours.item_ids[:3], ours.item_ids)
    assert ours.score([request])[0].tolist() == theirs.score([request])[0].tolist()


@pytest.mark.parametrize(("rule", "state"), [([], "done"), (["promotion.min_paired_difference=-1"], "promoted")])
def test_the_end_of_a_run_says_that_it_is_below_its_anchor(anchored_run, tmp_path, capsys, rule, state):
    run, loss = tmp_path / "run", "stage 2 is proven worse than its anchor: auc -0.0200 [-0.0300, -0.0100]"
    shutil.copytree(anchored_run, run, symlinks=True)
    for is_worse in (False, True):
        report = RunDir(run).read_record("eval") | {"proven_loss": loss if is_worse else None}
        RunDir(run).write_record("eval", report)
        assert run_pipeline(load_config(run / "config.yaml", [f"run.dir={run}", *rule])) == 0
        status = json.loads((run / "status.json").read_text(encoding="utf-8"))
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["message"] == status["message"]
        assert (status["state"], loss in (status["message"] or "")) == (state, is_worse)


@pytest.fixture
def linked_run(anchored_run, tmp_path):
    """Config and directory of a run that takes all steps from the anchored one and is published; not started."""
    settings = {"run.dir": tmp_path / "linked", "run.reuse": [str(anchored_run)], "run.publish_to": tmp_path / "out"}
    overrides = [f"{name}={value}" for name, value in settings.items()]
    return load_config(anchored_run / "config.yaml", overrides), RunDir(tmp_path / "linked")


def test_a_run_of_linked_steps_has_its_anchor_wherever_it_goes(anchored_run, linked_run, tmp_path):
    config, run_dir = linked_run
    assert run_pipeline(config) == 0
    assert all(run_dir.step_dir(step).is_symlink() for step in STEPS)
    export_model(config, run_dir, tmp_path / "export", Licences("apache-2.0", "apache-2.0", "made up"))
    import_model(tmp_path / "export", RunDir(tmp_path / "imported"))
    request = RankingRequest(None, ["3", "17"], ["5", "6", "40"])
    expected = collm_dist.load_recommender(anchored_run, device="cpu").score([request])[0].tolist()
    for folder in (run_dir.path, tmp_path / "out" / "linked", tmp_path / "imported"):
        assert collm_dist.load_recommender(folder, device="cpu").score([request])[0].tolist() == expected


@pytest.mark.parametrize("remedy", ["pipeline", "stage"])
def test_the_remedies_for_a_lost_anchor_make_it_again(linked_run, tmp_path, remedy):
    config, run_dir = linked_run
    assert run_pipeline(config) == 0
    shutil.rmtree(run_dir.anchor_dir)
    with pytest.raises(ArtifactError, match="run the pipeline or the stage again"):
        load_anchor(config, run_dir)
    with pytest.raises(ArtifactError, match="run the pipeline or the stage again"):
        export_model(config, run_dir, tmp_path / "export", Licences("apache-2.0", "apache-2.0", "made up"))
    if remedy == "pipeline":
        assert run_pipeline(config) == 0
    else:
        run_stage(config, run_dir, "stage1")
    assert load_anchor(config, run_dir) is not None


def test_a_stage_that_is_taken_over_has_its_anchor(anchored_run, tmp_path, same_environment):
    overrides = [f"run.dir={tmp_path}", f"dataset.extend_from={anchored_run}", "stage1.refresh_every_days=60"]
    config, run_dir = load_config(anchored_run / "config.yaml", overrides), RunDir(tmp_path)
    for step in ("data", "cf"):
        link_step(step, RunDir(anchored_run), run_dir)
    assert run_stage(config, run_dir, "stage1")["taken_from"] == str(anchored_run.resolve())
    assert load_anchor(config, run_dir) is not None


def test_the_service_answers_with_anchored_scores(anchored_run):
    recommender = collm_dist.load_recommender(anchored_run, device="cpu")
    query = {"user": "7", "candidates": ["3", "17", "40", "5", "61"]}
    with serving(anchored_run) as service:
        answers = [service.ask(query, path=path) for path in ("/rank", "/compare")]
    assert [status for status, *_ in answers] == [200, 200]
    ranked, compared = (answer for *_, answer in answers)
    expected = recommender.rank(**query)
    assert [item["item_id"] for item in ranked["ranked"]] == [item.item_id for item in expected]
    scores = [item.score for item in expected]
    assert [item["score"] for item in ranked["ranked"]] == pytest.approx(scores, abs=TOLERANCE)
    assert [item["language_model"]["score"] for item in compared["items"]] == pytest.approx(scores, abs=TOLERANCE)
    anchors = [item.anchor.score for item in recommender.compare(RankingQuery(**query)).items]
    assert [item["anchor"]["score"] for item in compared["items"]] == pytest.approx(anchors, abs=TOLERANCE)
    assert max(abs(score - anchor) for score, anchor in zip(scores, anchors, strict=True)) > 10 * TOLERANCE
