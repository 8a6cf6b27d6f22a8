"""Comparison of three rankings of the same items: popularity, collaborative model, language model.

Popularity is the number of likes in the log. A score of the language model comes with its parts, so a difference
between its ranking and the anchor's can be explained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np

from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.errors import RequestError
from collm_dist.serving.block_scorer import BlockScorer, ScoreParts, Scores
from collm_dist.serving.requests import RankingQuery, RankingRequest, RequestReader


@dataclass(frozen=True)
class Place:
    """Place of an item in a ranking of all candidates.

    Attributes:
        score: likes in the log, or a logit of a like.
        rank: 1 is the best.
    """

    score: float
    rank: int


@dataclass(frozen=True)
class NamedItem:
    """Raw id and title of an item."""

    item_id: str
    title: str


@dataclass(frozen=True)
class ComparedItem(NamedItem):
    """An item in all rankings. Without rounding, anchor.score + llm + bias = language_model.score.

    Attributes:
        popularity: by likes in the log.
        collaborative: by the collaborative model; None if the run has none that orders items.
        language_model: by the run's stage, as in ``Recommender.rank``.
        anchor: by the anchor alone; None if the run has no anchor.
        llm: share of the language model in the score: its own score times the learned gain.
        bias: share that is the same for all items.
    """

    popularity: Place
    collaborative: Place | None
    language_model: Place
    anchor: Place | None
    llm: float
    bias: float


@dataclass(frozen=True)
class Comparison:
    """Answer of ``Recommender.compare``.

    Attributes:
        items: the items among the first ``top_k`` of any ranking, in the order of the language model.
        num_candidates: number of candidates that were ranked.
        is_known_user: whether the request names a user of the log.
        history, disliked: items that the models read as the user's likes and last dislikes, oldest first.
        warnings: what the run does not know of the request, and candidates that are left out, as in ``Ranking``.
    """

    items: list[ComparedItem]
    num_candidates: int
    is_known_user: bool
    history: list[NamedItem]
    disliked: list[NamedItem]
    warnings: list[str]


class Comparer:
    """The rankings of a run's models."""

    def __init__(self, reader: RequestReader, scorer: BlockScorer, name_item: Callable[[int], NamedItem]) -> None:
        """Store the parts of a recommender.

        Args:
            reader: reader of requests.
            scorer: the models.
            name_item: returns id and title of an item, given its dense index.
        """
        self._reader, self._scorer, self._name_item = reader, scorer, name_item

    def compare(self, request: RankingRequest, top_k: int | None) -> Comparison:
        """Return the rankings of a request's candidates, which may be none.

        Raises:
            RequestError: a field is invalid.
            ArtifactError: a score is not finite.
        """
        user = self._reader.read_user(request)
        items: list[ComparedItem] = []
        if request.candidates:
            block = self._reader.build_block([user], [self._reader.read_candidates(request)])
            # Of the log alone, as the page says and as GET /items shows; the models read fresh events too.
            likes, _ = self._reader.count_item_events(block.item_idx, request.as_of)
            cf = self._scorer.score_by_cf(block) if self._scorer.has_cf else None
            items = self._list_items(block, likes.astype(np.float64), cf, self._scorer.score_parts(block), top_k)
        return Comparison(
            items,
            len(request.candidates),
            user.user_idx >= 0,
            [self._name_item(index) for index in user.history.tolist()],
            [self._name_item(index) for index in user.dislikes.tolist()],
            self._reader.find_unknown(request).list_warnings(),
        )

    def _list_items(
        self, block: ContextBlock, likes: Scores, cf: Scores | None, parts: ScoreParts, top_k: int | None
    ) -> list[ComparedItem]:
        """Return the items of the first places, in the order of the language model."""
        item_idx = block.item_idx
        popularity, language_model = rank_scores(item_idx, likes), rank_scores(item_idx, parts.scores)
        collaborative = None if cf is None else rank_scores(item_idx, cf)
        anchor = None if parts.anchors is None else rank_scores(item_idx, parts.anchors)
        compared = [popularity, language_model, *([] if collaborative is None else [collaborative])]
        last = top_k or len(item_idx)
        items = []
        for position in np.argsort([place.rank for place in language_model]).tolist():
            if all(places[position].rank > last for places in compared):
                continue
            item = self._name_item(int(item_idx[position]))
            items.append(
                ComparedItem(
                    item.item_id,
                    item.title,
                    popularity[position],
                    None if collaborative is None else collaborative[position],
                    language_model[position],
                    None if anchor is None else anchor[position],
                    float(parts.llm[position]),
                    parts.bias,
                )
            )
        return items


def rank_scores(item_idx: IntArray, scores: Scores) -> list[Place]:
    """Return the places of (N,) items with (N,) scores. Equal scores keep the order of the item table."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.lexsort((item_idx, -scores))] = np.arange(1, len(scores) + 1)
    return [Place(score, rank) for score, rank in zip(scores.tolist(), ranks.tolist(), strict=True)]


def take_turns(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Return the ids of two lists alternately, each once."""
    turns = chain.from_iterable(zip_longest(first, second))
    return [item_id for item_id in dict.fromkeys(turns) if item_id is not None]


def compare_each(
    compare: Callable[[RankingQuery], Comparison], queries: Sequence[RankingQuery]
) -> list[Comparison | RequestError]:
    """Answer each query by ``Recommender.compare``, or with the error that it causes."""
    answers: list[Comparison | RequestError] = []
    for query in queries:
        try:
            answers.append(compare(query))
        except RequestError as error:
            answers.append(error)
    return answers
