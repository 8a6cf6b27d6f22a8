"""Ids of a request that the run does not know are named."""

import pickle

import numpy as np

from collm_dist.data.ingest.id_forms import IdIndex
from collm_dist.serving.requests import RankedItem, Ranking, RankingRequest, RequestReader

READER = RequestReader(
    IdIndex(["u"]), IdIndex([str(item) for item in range(9)]), None, max_history_length=5, max_dislikes=2,
    every_event_is_a_like=False,
)  # fmt: skip


def warn(**request):
    return READER.find_unknown(RankingRequest(**request)).list_warnings()


def test_users_and_ids_of_lists_are_named():
    assert warn(user="u", history=[1, "2"], disliked=[]) == warn() == warn(history=np.array([1, 2])) == []
    assert warn(user=7) == ["user: '7' is not in the run's log; the items are ranked for an unknown user"]
    found = warn(user="u", history=["1", "x", *"abcdef"], disliked=["y"])
    assert found == [
        "history: 7 of 8 ids are not in the run's item table and are skipped ('x', 'a', 'b', 'c', 'd', ...)",
        "disliked: 1 of 1 ids are not in the run's item table and are skipped ('y')",
    ]


def test_a_ranking_is_a_list_with_warnings():
    items = [RankedItem("a", 0.5, 1, "A")]
    ranking = pickle.loads(pickle.dumps(Ranking(items, ["user: new"])))
    assert ranking == items
    assert ranking.warnings == ["user: new"]
