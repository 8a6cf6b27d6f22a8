"""Anchors: features against plain loops, no label of an equal or later time, files, and refusals."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from collm_dist.anchor import cooccurrence, fit_anchor, load_anchor, prepare_anchor, score_anchor
from collm_dist.anchor.cooccurrence import WINDOW, Cooccurrence
from collm_dist.anchor.features import FEATURES
from collm_dist.anchor.score_anchor import divide_times, find_first_folds
from collm_dist.anchor.text_similarity import LAST_WEIGHT, TEXT_FEATURES, TextSimilarity
from collm_dist.config import Config
from collm_dist.data.shards.context_block import concatenate_blocks
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ArtifactError
from collm_dist.metrics import compute_auc
from tests.unit.evaluation_data import build_block
from tests.unit.evaluation_run import build_config, write_data_step

TEXTS = ["red shoe", "red shoe", "blue hat", "", "red hat 42"]


def anchored(config: Config, kind: str | None, recent_share: float | None = None) -> Config:
    settings = {"kind": kind, "recent_share": recent_share}
    return config.model_copy(update={"anchor": config.anchor.model_copy(update=settings)})


def read_rows(run_dir, split):
    data_dir = run_dir.step_dir("data")
    order = GlobalOrder(data_dir, load_manifest(data_dir), split, 0, 64, shuffle=False)
    return concatenate_blocks(list(order.iter_batches()))


def build_tfidf(texts):
    """Return the unit TF-IDF vectors of scikit-learn's definition, as dictionaries."""
    documents = []
    for text in texts:
        words = text.split()
        documents.append(Counter(words + [" ".join(pair) for pair in itertools.pairwise(words)]))
    frequency = Counter(term for document in documents for term in document)
    vectors = []
    for document in documents:
        vector = {
            term: (1 + math.log(count)) * (math.log((1 + len(texts)) / (1 + frequency[term])) + 1)
            for term, count in document.items()
        }
        norm = math.sqrt(sum(value**2 for value in vector.values())) or 1.0
        vectors.append({term: value / norm for term, value in vector.items()})
    return vectors


def test_text_features_equal_a_plain_computation():
    vectors = build_tfidf(TEXTS)
    cosine = [[sum(value * other.get(term, 0.0) for term, value in vector.items()) for other in vectors]
              for vector in vectors]  # fmt: skip
    texts = TextSimilarity.fit(TEXTS)
    block = build_block([0, 1, 2], histories=[[2, 4], [], [3]], item_idx=[0, 1, 3])
    block = dataclasses.replace(block, dislike_offsets=np.array([0, 2, 2, 3]), dislike_items=np.array([2, 1, 0]))
    features = texts.compute_features(block)
    liked, disliked = cosine[0][2] + cosine[0][4], cosine[0][2] + cosine[0][1]
    expected = [cosine[0][4], max(cosine[0][2], cosine[0][4]), cosine[0][1], math.log1p(liked), math.log1p(disliked),
                math.log((liked + 0.5) / (disliked + 0.5))]  # fmt: skip
    assert features[0] == pytest.approx(expected, abs=1e-6)
    assert features[1] == pytest.approx([0, 0, 0, 0, 0, 0])
    assert features[2] == pytest.approx([0, 0, 0, 0, 0, 0])  # an item without words
    assert texts.score_last_likes(block)[0] == pytest.approx(expected[1] + LAST_WEIGHT * expected[0], abs=1e-6)
    assert not TextSimilarity.fit(["", " "]).compute_features(block.take_targets(np.array([1]))).any()


def test_cooccurrence_counts_only_earlier_folds():
    random = np.random.default_rng(0)
    users, items, times = np.sort(random.integers(0, 6, 90)), random.integers(0, 8, 90), np.arange(90)
    labels, starts = random.integers(0, 2, 90), (30, 60, 90)
    train = {"user_idx": users, "item_idx": items, "label": labels, "sampled": np.zeros(90, int), "timestamp": times}
    block = build_block([0, 0, 0], histories=[[1, 2, 3]] * 3, item_idx=[4, 5, 2])
    table = Cooccurrence.fit(train, 8, starts)
    for fold in range(4):
        pairs, counts = Counter(), Counter()
        for user in range(6):
            liked = [(items[row], row) for row in np.flatnonzero((users == user) & (labels == 1))]
            for place, (item, time) in enumerate(liked):
                is_earlier = np.searchsorted(starts, time, side="right") < fold
                counts[item] += is_earlier
                for other, _ in liked[max(0, place - WINDOW) : place]:
                    pairs[frozenset((item, other))] += is_earlier
        expected = [
            sum(
                pairs[frozenset((target, item))] / math.sqrt(max(counts[target] * counts[item], 1))
                for item in (1, 2, 3)
            )
            for target in (4, 5, 2)
        ]
        assert table.score(block, np.full(3, fold)) == pytest.approx(expected)


@pytest.mark.parametrize("max_rows", [None, 100], ids=["all users", "some users"])
@pytest.mark.parametrize("kind", ["as_of", "blend"])
def test_no_anchor_depends_on_a_label_of_an_equal_or_later_time(tmp_path, monkeypatch, kind, max_rows):
    if max_rows is not None:  # of 400 rows: other users are left out
        monkeypatch.setattr(score_anchor, "_MAX_FIT_ROWS", max_rows)
        monkeypatch.setattr(cooccurrence, "MAX_LIKES", max_rows)
    config, scores = build_config(tmp_path), {}
    for name, flip in {"as it is": None, "one": 200, "all": np.arange(198, 600)}.items():
        run_dir = write_data_step(tmp_path / name, flip=flip, rows_per_second=3, max_dislikes=5)
        block = read_rows(run_dir, "train")
        order = np.argsort(block.row_id)
        anchor = fit_anchor(config, run_dir, kind)
        scores[name] = anchor.score(block)[order]
        varied = anchor.source.compute(block).std(axis=0) > 0
        assert kind == "as_of" or varied[[list(FEATURES[kind]).index(name) for name in TEXT_FEATURES]].all()
    moved = block.timestamp[order] > block.timestamp[order][200]
    for name in ("one", "all"):
        assert np.array_equal(scores["as it is"][~moved], scores[name][~moved])
        assert not np.array_equal(scores["as it is"][moved], scores[name][moved])


@pytest.mark.parametrize("ties", ["strict", "order"])
def test_likes_of_the_same_second_count_only_in_the_order_of_the_file(tmp_path, ties):
    config, scores = build_config(tmp_path), {}
    for name, flip in {"as it is": None, "flipped": 207}.items():
        run_dir = write_data_step(tmp_path / name, flip=flip, rows_per_second=20, max_dislikes=5, ties=ties)
        block = read_rows(run_dir, "train")
        order = np.argsort(block.row_id)
        scores[name] = fit_anchor(config, run_dir, "blend").score(block)[order]
    users, times = block.user_idx[block.target_contexts][order], block.timestamp[order]
    same = np.flatnonzero((users == users[207]) & (times == times[207]))
    assert same.tolist() == [203, 207, 210, 212]
    changed = scores["as it is"] != scores["flipped"]
    assert not changed[:208].any()
    assert changed[same].any() == (ties == "order")
    others = np.setdiff1d(np.flatnonzero(times == times[207]), same)
    assert not changed[others].any()
    assert changed[times > times[207]].any()


def test_the_first_folds_may_lack_the_users_that_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(score_anchor, "_MAX_FIT_ROWS", 1)
    run_dir, config = write_data_step(tmp_path), build_config(tmp_path)
    seed = 20  # the user that it keeps comes after the first fold
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
    manifest = load_manifest(run_dir.step_dir("data"))
    kept = GlobalOrder(run_dir.step_dir("data"), manifest, "train", seed, 64, max_users=1)
    anchor = fit_anchor(config, run_dir, "as_of")
    starts = anchor.source.fold_starts
    assert starts[0] < min(block.timestamp.min() for block in kept.iter_batches()) < starts[-1]
    assert not anchor.weights[1].any()
    assert anchor.intercepts[1] == 0
    assert anchor.weights[-1].any()


def test_an_anchor_ranks_rows_that_it_was_not_fitted_to(tmp_path):
    run_dir, config = write_data_step(tmp_path, count=2000), build_config(tmp_path)
    anchor = fit_anchor(config, run_dir, "as_of")
    valid, train = read_rows(run_dir, "valid"), read_rows(run_dir, "train")
    assert compute_auc(valid.label, anchor.score(valid)) > 0.65
    first = train.timestamp < anchor.source.fold_starts[0]
    assert first.any()
    assert not anchor.score(train)[first].any()


def test_a_recent_share_fits_each_fold_to_the_folds_just_before_it(tmp_path):
    run_dir, config = write_data_step(tmp_path, count=2000), build_config(tmp_path)
    anchor = fit_anchor(anchored(config, None, 0.5), run_dir, "as_of")
    train = read_rows(run_dir, "train")
    features, folds = anchor.source.compute(train), anchor.source.find_folds(train)
    assert folds.max() == 15
    for fold, first in ((3, 0), (8, 0), (12, 4), (16, 8)):
        rows = (folds >= first) & (folds < fold)
        plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        expected = plain.fit(features[rows], train.label[rows]).decision_function(features)
        # The largest measured difference is 8e-15; rows in another order could move the optimizer's end.
        assert features @ anchor.weights[fold] + anchor.intercepts[fold] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "share", "firsts"),
    [
        ([99, 101] * 8, 0.5, [0] * 9 + list(range(1, 9))),
        ([100] * 16, 1.0, [0] * 17),
        ([100] * 16, 0.01, [0, *range(16)]),
        ([900, 40, 30, 30], 0.5, [0, 0, 0, 0, 0]),  # most rows have the first date
        ([30, 30, 40, 900], 0.5, [0, 0, 0, 0, 3]),
        ([20] * 5, 0.5, [0, 0, 0, 0, 1, 2]),
        ([100], 0.5, [0, 0]),
        ([0, 0, 50, 50], 0.5, [0, 0, 0, 2, 3]),  # the first folds lack the users that are kept
    ],
)
def test_a_fold_is_fitted_to_the_newest_folds_that_hold_the_share(rows, share, firsts):
    assert find_first_folds(np.array(rows), share) == firsts


def test_a_written_anchor_is_loaded_and_made_again_for_other_data(tmp_path):
    run_dir, config = write_data_step(tmp_path / "run"), anchored(build_config(tmp_path / "run"), "blend")
    with pytest.raises(ArtifactError, match="is missing or damaged: restore"):
        load_anchor(config, run_dir)
    prepare_anchor(config, run_dir)
    block = read_rows(run_dir, "valid")
    expected = fit_anchor(config, run_dir, "blend").score(block)
    assert np.array_equal(load_anchor(config, run_dir).score(block), expected)
    written = (run_dir.anchor_dir / "anchor.json").stat().st_mtime_ns
    prepare_anchor(config, run_dir)
    assert (run_dir.anchor_dir / "anchor.json").stat().st_mtime_ns == written
    arrays = run_dir.anchor_dir / "arrays.safetensors"
    whole = arrays.read_bytes()
    for damaged in (b"", whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1])):
        arrays.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="is damaged"):
            load_anchor(config, run_dir)
    arrays.write_bytes(whole)
    record = run_dir.anchor_dir / "anchor.json"
    text = record.read_text()
    record.write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="is missing or damaged"):
        load_anchor(config, run_dir)
    record.write_text(text.replace('"format_version": 3', '"format_version": 3, "note": 0'))
    with pytest.raises(ArtifactError, match="is damaged"):  # one changed weight would change all scores
        load_anchor(config, run_dir)
    record.write_text(text.replace('"format_version": 3', '"format_version": 2'))
    with pytest.raises(ArtifactError, match="was written by another version"):
        load_anchor(config, run_dir)
    record.write_text(text)
    load_anchor(config, run_dir)
    other = anchored(config, "as_of")
    with pytest.raises(ArtifactError, match="other data"):
        load_anchor(other, run_dir)
    prepare_anchor(other, run_dir)
    assert load_anchor(other, run_dir).source.kind == "as_of"
    with pytest.raises(ArtifactError, match="other data"):
        load_anchor(anchored(config, "as_of", 1.0), run_dir)
    assert load_anchor(build_config(tmp_path), run_dir) is None


def test_folds_adapt_to_few_distinct_times():
    assert divide_times(np.zeros(50, np.int64), 0) == (1,)
    assert divide_times(np.repeat([3, 9], 50), 9) == (9, 10)
    assert len(divide_times(np.arange(1600), 1599)) == 16


def test_a_cf_anchor_needs_time_folds(tmp_path):
    with pytest.raises(ValueError, match=r"cf\.cross_fit"):
        Config.model_validate(build_config(tmp_path).model_dump() | {"anchor": {"kind": "cf"}})
    assert Config.model_validate(build_config(tmp_path).model_dump() | {"anchor": {"kind": "none"}}).anchor.kind is None
