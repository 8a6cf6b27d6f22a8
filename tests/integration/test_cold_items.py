"""A run with ``cf.item_text``: texts give items without training rows slots, anchors and a place in retrieval."""

import numpy as np
import pytest
import torch

import collm_dist
from collm_dist import RankingRequest
from collm_dist.anchor import load_anchor
from collm_dist.anchor.features import FEATURES
from collm_dist.data.shards.interactions import load_interactions
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.tuning.run_stage import run_stage
from tests.conftest import REPOSITORY
from tests.integration.finished_run import begin_run

pytestmark = pytest.mark.usefixtures("same_environment")

COLD = ["77", "78", "79", "80"]


@pytest.fixture(scope="module")
def cold_run(tmp_path_factory, tiny_ratings, tiny_backbone_dir):
    """A pipeline without stage 1 and evaluation, on a log in which four items appear in the last tenth alone."""
    folder = tmp_path_factory.mktemp("cold")
    header, *rows = (tiny_ratings / "ratings.csv").read_text().splitlines(keepends=True)
    start = len(rows) * 9 // 10
    kept = [row for place, row in enumerate(rows) if place >= start or row.split(",")[1] not in COLD]
    (folder / "ratings.csv").write_text("".join([header, *kept]))
    overrides = [
        f"run.dir={folder / 'run'}",
        f"dataset.path={folder / 'ratings.csv'}",
        f"dataset.items_path={tiny_ratings / 'items.csv'}",
        f"llm.backbone={tiny_backbone_dir}",
        "cf.item_text=8",
        "cf.cross_fit=2",
        "anchor.kind=blend",
        "stage1.enabled=false",
        "stage2.max_steps=2",
    ]
    config, run_dir = begin_run(REPOSITORY / "configs" / "tiny_cpu.yaml", overrides)
    run_stage(config, run_dir, "stage2")
    return config, run_dir


@pytest.fixture(scope="module")
def recommender(cold_run):
    return collm_dist.load_recommender(cold_run[1].path, device="cpu")


@pytest.fixture(scope="module")
def request_of_a_user(cold_run):
    """A request right after the training rows, when the cold items have no events yet, so only their texts differ."""
    now = load_manifest(cold_run[1].step_dir("data")).splits["train"].last_timestamp + 1
    return RankingRequest("7", candidates=COLD, as_of=now)


def test_cold_items_have_vectors_of_their_own_in_slots(cold_run, recommender, request_of_a_user):
    cold = np.array([recommender.item_ids.index(item_id) for item_id in COLD])
    log = load_interactions(cold_run[1].step_dir("data"), ("item_idx", "timestamp"), "train")
    assert not np.isin(cold, log["item_idx"]).any()
    cf = recommender._scorer._loaded.model.cf_model
    now = torch.full((5,), request_of_a_user.as_of)
    vectors = cf.item_vectors(torch.from_numpy(np.append(cold, -1)), now)
    for first in range(5):
        for second in range(first):
            assert (vectors[first] - vectors[second]).abs().max() > 1e-3


def test_the_anchors_of_cold_items_differ_by_their_texts(cold_run, recommender, request_of_a_user):
    config, run_dir = cold_run
    reader = recommender._reader
    block = reader.build_block([reader.read_user(request_of_a_user)], [reader.read_candidates(request_of_a_user)])
    anchor = load_anchor(config, run_dir)
    features = dict(zip(FEATURES["blend"], anchor.source.compute(block).T, strict=True))
    assert not features["cf_unknown"].any()
    assert len(set(features["cf_logit"].tolist())) == len(COLD)
    assert len(set(anchor.score(block).tolist())) == len(COLD)
    # Their likes and rows so far are equal, so nothing but the texts can tell them apart.
    others = [name for name in features if not name.startswith(("cf_", "text_"))]
    assert len(others) > 5
    assert all(len(set(features[name].tolist())) == 1 for name in others)


def test_retrieval_returns_cold_items_by_their_scores(recommender, request_of_a_user):
    found = recommender.retrieve([request_of_a_user], len(recommender.item_ids))[0]
    scores = recommender.score_cf([RankingRequest("7", candidates=found, as_of=request_of_a_user.as_of)])[0]
    assert set(COLD) <= set(found)
    assert len({scores[found.index(item_id)] for item_id in COLD}) == len(COLD)
    assert np.all(np.diff(scores) < 1e-6)
    first = min(found.index(item_id) for item_id in COLD)
    assert recommender.retrieve([request_of_a_user], first + 1)[0][-1] == found[first]
    assert len(found) > first + 1
