"""Three rankings of the same items, with the parts of each score, and the search of titles."""

import numpy as np

from collm_dist import RankingRequest
from collm_dist.data.shards.interactions import load_interactions
from collm_dist.errors import RequestError
from collm_dist.serving.ranking_comparison import compare_each
from collm_dist.serving.requests import RankingQuery

LIKED, CANDIDATES = ["3", "17", "40"], [str(number) for number in range(41, 71)]


def check_comparison(comparison, recommender):
    """Check ranks and parts of a comparison of all candidates."""
    items = comparison.items
    assert len(items) == comparison.num_candidates
    for name in ("popularity", "collaborative", "language_model", "anchor"):
        places = [getattr(item, name) for item in items]
        if None in places:
            assert set(places) == {None}
            continue
        by_rank = sorted(places, key=lambda place: place.rank)
        assert [place.rank for place in by_rank] == list(range(1, len(items) + 1))
        assert [place.score for place in by_rank] == sorted((place.score for place in places), reverse=True)
    assert [item.language_model.rank for item in items] == list(range(1, len(items) + 1))
    for item in items:
        anchor = 0.0 if item.anchor is None else item.anchor.score
        assert anchor + item.llm + item.bias == item.language_model.score  # exactly


def test_three_rankings_of_the_same_items(finished_run, recommender):
    query = RankingQuery(user="5", candidates=CANDIDATES)
    comparison = recommender.compare(query)
    check_comparison(comparison, recommender)
    assert comparison.is_known_user
    ranked = recommender.rank(user="5", candidates=CANDIDATES)
    assert [(item.item_id, item.title) for item in comparison.items] == [(item.item_id, item.title) for item in ranked]
    found = {item.item_id: item for item in comparison.items}
    assert [found[item.item_id].language_model.score for item in ranked] == [item.score for item in ranked]
    request = RankingRequest("5", candidates=CANDIDATES)
    cf = recommender.score_cf([request])[0]
    assert [found[item_id].collaborative.score for item_id in CANDIDATES] == cf.tolist()
    log, items = load_interactions(finished_run / "data", ("item_idx", "label")), recommender.item_ids
    likes = np.bincount(log["item_idx"], log["label"], len(items))
    assert [found[item_id].popularity.score for item_id in CANDIDATES] == [
        likes[items.index(item_id)] for item_id in CANDIDATES
    ]
    user = recommender._reader.read_user(request)
    assert [item.item_id for item in comparison.history] == [items[index] for index in user.history]
    best = recommender.compare(RankingQuery(user="5", candidates=CANDIDATES, top_k=2)).items
    assert [item.item_id for item in best] == [
        item.item_id
        for item in comparison.items
        if min(item.popularity.rank, item.collaborative.rank, item.language_model.rank) <= 2
    ]


def test_both_simple_rankings_give_the_candidates(recommender, monkeypatch):
    comparison = recommender.compare(RankingQuery(history=LIKED, num_retrieved=12))
    check_comparison(comparison, recommender)
    assert (comparison.num_candidates, comparison.is_known_user) == (12, False)
    everything = recommender.compare(
        RankingQuery(history=LIKED, candidates=sorted(set(recommender.item_ids) - {*LIKED}))
    )
    found = {item.item_id for item in comparison.items}
    for name in ("popularity", "collaborative"):
        first = {item.item_id for item in everything.items if getattr(item, name).rank <= 6}
        assert first <= found
    monkeypatch.setattr(recommender._scorer, "_cf", None)  # a run without a collaborative model
    popular = recommender.compare(RankingQuery(history=LIKED, num_retrieved=6))
    check_comparison(popular, recommender)
    assert {item.item_id for item in popular.items} == {
        item.item_id for item in everything.items if item.popularity.rank <= 6
    }
    assert all(item.collaborative is None for item in popular.items)


def test_comparisons_by_stage_1_and_of_nothing(recommender, text_recommender):
    check_comparison(text_recommender.compare(RankingQuery(history=LIKED, num_retrieved=9)), text_recommender)
    nothing = recommender.compare(RankingQuery(user="5", history=recommender.item_ids))
    assert (nothing.items, nothing.num_candidates) == ([], 0)
    stranger = recommender.compare(RankingQuery(user="nobody", num_retrieved=5))
    assert (stranger.is_known_user, stranger.history, len(stranger.items)) == (False, [], 5)
    assert len(stranger.warnings) == 1
    assert "user: 'nobody' is not in the run's log" in stranger.warnings[0]
    few = recommender.compare(RankingQuery(history=LIKED, allowed=["41", "42", "43"], blocked=["42"]))
    assert {item.item_id for item in few.items} == {"41", "43"}
    answers = compare_each(
        recommender.compare,
        [
            RankingQuery(history=LIKED, candidates=["none"]),
            RankingQuery(history=LIKED, candidates=CANDIDATES, top_k=0),
            RankingQuery(history=LIKED, num_retrieved=0),
            RankingQuery(history=LIKED, candidates=CANDIDATES),
        ],
    )
    messages = ["not in the run's item table", "top_k: 0 is less than 1", "candidates: 0 items cannot be retrieved"]
    for answer, message in zip(answers, messages, strict=False):
        assert isinstance(answer, RequestError)
        assert message in str(answer)
    assert answers[3].num_candidates == len(CANDIDATES)


def test_titles_are_searched(recommender):
    search = recommender.build_search()
    found, more = search.find("film 1", 3)
    assert [item.title.startswith("Film 1") for item in found] == [True] * 3
    assert more
    assert [item.title for item in search.find("12 film", 3)[0]] == ["Film 12 (1972)"]
    popular, _ = search.find("", 80)
    assert [item.likes for item in popular] == sorted((item.likes for item in popular), reverse=True)
    assert search.find("amelie", 5)[0][0].title == "Amélie — 2001"
