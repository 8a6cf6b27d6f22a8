"""Contexts kept between rankings: scores as without, also after events, a change of the run and forgotten users."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest

import collm_dist
from collm_dist import Event, EventStore
from collm_dist.errors import ArtifactError
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.finished_run import load_recommender
from collm_dist.serving.requests import RankingQuery
from collm_dist.serving.run_follower import RunFollower

# Float32 sums in another order: the largest measured difference is 5.7e-7, at scores of about 1.
TOLERANCE = 1e-5
ITEMS = [str(number) for number in range(41, 61)]


@pytest.fixture
def reusing(finished_run):
    """Recommender of the tiny run that keeps contexts, on the CPU."""
    return load_recommender(finished_run, "cpu", reuse_bytes=1 << 26)


def draw_queries(recommender, random, count):
    """Return queries of a few users of the log and of growing histories."""
    histories = [recommender.item_ids[:length] for length in range(1, 8)]
    queries = []
    for _ in range(count):
        candidates = random.choice(recommender.item_ids, 6, replace=False).tolist()
        if random.random() < 0.5:
            queries.append(RankingQuery(user=recommender.user_ids[random.integers(5)], candidates=candidates))
        else:
            queries.append(RankingQuery(history=histories[random.integers(7)], candidates=candidates))
    return queries


def find_largest_difference(ours, theirs):
    largest = 0.0
    for answer, expected in zip(ours, theirs, strict=True):
        scores = {item.item_id: item.score for item in expected}
        assert scores.keys() == {item.item_id for item in answer}
        largest = max(largest, *(abs(item.score - scores[item.item_id]) for item in answer))
    return largest


def test_rankings_are_those_without_reuse(recommender, reusing):
    random, largest = np.random.default_rng(3), 0.0
    for _ in range(8):
        queries = draw_queries(recommender, random, int(random.integers(1, 5)))
        largest = max(largest, find_largest_difference(reusing.rank_many(queries), recommender.rank_many(queries)))
    counts = reusing.kept_contexts.take_counts()
    print(f"largest difference {largest:.1e}, {counts}")
    assert largest < TOLERANCE
    assert counts.whole > 3
    assert counts.part > 1
    assert 0 < reusing.kept_contexts.num_bytes <= reusing.kept_contexts.max_bytes
    assert recommender.kept_contexts is None


def test_a_single_returning_user_gets_the_same_scores_to_the_last_bit(recommender, reusing):
    for user in recommender.user_ids[:4]:
        expected = recommender.rank(user=user, candidates=ITEMS)
        reusing.kept_contexts.drop()
        reusing.kept_contexts.take_counts()
        assert [reusing.rank(user=user, candidates=ITEMS) for _ in range(3)] == [expected] * 3
        counts = reusing.kept_contexts.take_counts()
        assert (counts.whole, counts.none) == (2, 1)
    query = RankingQuery(user=user, candidates=ITEMS)
    assert reusing.compare(query) == recommender.compare(query)


def test_an_event_extends_a_context_and_a_forgotten_user_empties_the_store(finished_run, tmp_path):
    store = EventStore(tmp_path)
    ours = load_recommender(finished_run, "cpu", events=store, reuse_bytes=1 << 26)
    plain = load_recommender(finished_run, "cpu", events=store)
    largest = 0.0
    for number, item in enumerate(["3", "17", "40", "9"]):
        store.add([Event(f"e{number}", "newcomer", item, 1_040_000_000 + number, 1)])
        query = {"user": "newcomer", "candidates": ITEMS}
        largest = max(largest, find_largest_difference([ours.rank(**query)], [plain.rank(**query)]))
        counts = ours.kept_contexts.take_counts()
        # The prompt shows three titles: the fourth event moves all of them.
        assert (counts.whole, counts.part) == (0, int(0 < number < 3))
    print(f"largest difference {largest:.1e}")
    assert largest < TOLERANCE
    held = ours.kept_contexts.num_bytes
    ours.rank(history=["9"], candidates=ITEMS)
    assert ours.kept_contexts.num_bytes > held
    ours.kept_contexts.take_counts()
    store.forget(["newcomer"])
    ours.rank(history=["40"], candidates=ITEMS)  # of anyone
    counts = ours.kept_contexts.take_counts()
    assert 0 < ours.kept_contexts.num_bytes < held
    assert counts.none == 1


def test_a_run_that_takes_over_finds_nothing_of_the_run_before(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "one")
    (tmp_path / "current").symlink_to(tmp_path / "one")

    def follow():
        def load(run):
            return load_recommender(run.path, "cpu", reuse_bytes=1 << 26, accept_stage1=True)

        return RunFollower(RunDir(tmp_path / "one"), load, tmp_path / "current", every_s=3600)

    follower = follow()
    first = follower.served.recommender
    query = RankingQuery(user=first.user_ids[2], candidates=ITEMS)
    before = [follower.served.recommender.rank_many([query])[0] for _ in range(2)][1]
    # The next run has another model: stage 1 of the same run.
    shutil.copytree(finished_run, tmp_path / "two", ignore=shutil.ignore_patterns("stage2", "eval"))
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path / "two")
    follower.look()
    follower.stop()
    second = follower.served.recommender
    assert second is not first
    second.kept_contexts.take_counts()
    after = second.rank_many([query])[0]
    expected = collm_dist.load_recommender(tmp_path / "two", "cpu", accept_stage1=True).rank_many([query])[0]
    assert second.kept_contexts.take_counts().whole == 0
    assert after == expected
    assert after != before
    # A replica that starts anew while the link leads to a damaged run goes on with the one before.
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    (tmp_path / "three" / "stage1" / "merged" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path / "three")
    restarted = follow()
    restarted.stop()
    assert (restarted.describe().run, restarted.describe().refused.run) == ("two", "three")
    shutil.rmtree(tmp_path / "two")
    assert follow().describe().run == "one"
    # What cannot be noted is served all the same.
    note = tmp_path / ".current.served.json"
    note.unlink()
    note.mkdir()
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path / "one")
    assert follow().describe().refused is None


@pytest.mark.parametrize(
    ("error", "retries"), [(MemoryError("no room"), True), (ArtifactError("damaged"), False)], ids=["memory", "files"]
)
def test_a_run_kept_out_by_the_machine_is_tried_again(finished_run, tmp_path, monkeypatch, error, retries):
    """Damage stays until the files change; a lack of memory may pass."""
    copied = shutil.copytree(finished_run, tmp_path / "copied", ignore=shutil.ignore_patterns("eval"))
    (tmp_path / "current").symlink_to(finished_run)
    tries = []

    def load(run):
        if run.path == copied and not tries.append(run) and len(tries) == 1:
            raise error
        return load_recommender(run.path, "cpu")

    follower = RunFollower(RunDir(finished_run), load, tmp_path / "current", every_s=3600)
    follower.stop()
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(copied)
    follower.look()
    assert follower.describe().refused.run == "copied"
    follower.look()
    assert len(tries) == 1, "it must not be loaded at each look"
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 3600)
    follower.look()
    assert len(tries) == 1 + retries
    assert (follower.describe().refused is None) == retries
