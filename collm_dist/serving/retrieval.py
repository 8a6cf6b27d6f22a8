"""Retrieval: the items worth ranking for a user, by the collaborative model and by the number of likes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.shards.context_block import IntArray
from collm_dist.serving.block_scorer import BlockScorer
from collm_dist.serving.item_index import ItemIndex
from collm_dist.serving.offered_items import OfferedItems
from collm_dist.serving.ranking_comparison import take_turns
from collm_dist.serving.request_errors import check_count, naming_request
from collm_dist.serving.requests import RankingRequest, RequestReader, UserContext

logger = logging.getLogger(__name__)

# Items that an index finds beyond those asked for, to be put in order by the model itself.
_SPARE = 100
# Users whose retrieval shows how thoroughly an index must search.
_SAMPLED_USERS = 64


class Retriever:
    """Retrieval of a recommender, which opens the requests for reading. It is not thread-safe."""

    def __init__(
        self,
        reader: RequestReader,
        scorer: BlockScorer,
        user_ids: Sequence[str],
        item_ids: Sequence[str],
        offered: OfferedItems,
    ) -> None:
        """Store the parts of a recommender.

        Args:
            reader: reader of requests.
            scorer: the models.
            user_ids, item_ids: raw ids of all users and items of the run.
            offered: the items that may be retrieved at a time.
        """
        self._reader, self._scorer, self._offered = reader, scorer, offered
        self._user_ids, self._item_ids = user_ids, item_ids

    def propose(self, request: RankingRequest, count: int) -> list[str]:
        """Return items for a comparison: the best by the collaborative model and the most liked in turns."""
        check_count(count)
        user = self._reader.read_user(request)
        allowed, excluded = self._reader.read_pool(request, user.seen)
        pool = np.setdiff1d(np.arange(len(self._item_ids)) if allowed is None else allowed, excluded)
        available = self._offered.find(request.as_of)
        pool = pool if available is None else pool[available[pool]]
        likes, _ = self._reader.count_item_events(pool, request.as_of)
        popular = [self._item_ids[index] for index in pool[np.argsort(-likes, kind="stable")[:count]].tolist()]
        best = self.retrieve([request], count)[0] if self._scorer.has_cf else popular
        return take_turns(best, popular)[:count]

    def retrieve(self, requests: Sequence[RankingRequest], count: int) -> list[list[str]]:
        """Return the best items for the user of each request; see ``Recommender.retrieve``."""
        retrieved: list[list[str]] = []
        for index, request in enumerate(requests):
            with naming_request(index, len(requests)):
                user = self._reader.read_user(request)
                allowed, excluded = self._reader.read_pool(request, user.seen)
            pool = self._find_pool(user, allowed, excluded, self._offered.find(request.as_of), count)
            if len(pool) == 0:
                retrieved.append([])
                continue
            scores = self._scorer.score_by_cf(self._reader.build_block([user], [pool]))
            best = pool[np.argsort(-scores, kind="stable")[:count]]
            retrieved.append([self._item_ids[index] for index in best.tolist()])
        return retrieved

    def _find_pool(
        self,
        user: UserContext,
        allowed: IntArray | None,
        excluded: IntArray,
        available: NDArray[np.bool_] | None,
        count: int,
    ) -> IntArray:
        """Return the items, ascending, that are worth scoring to find the ``count`` best ones."""
        if allowed is None and self._index is not None:
            query = self._scorer.compute_queries(self._reader.build_block([user], [np.zeros(1, np.int64)]))
            assert query is not None
            # Some more than asked for: statistics of another time, and the index, order them a little differently.
            allowed = np.sort(self._index.search(query[0], 2 * count + _SPARE + len(excluded), available))
        elif allowed is None:
            allowed = np.arange(len(self._item_ids))
        pool = np.setdiff1d(allowed, excluded)
        return pool if available is None else pool[available[pool]]

    @cached_property
    def _index(self) -> ItemIndex | None:
        """Index of all items; None if the collaborative model's scores are not inner products."""
        ids = self._user_ids or self._item_ids  # after an export without users, histories of one item
        sampled = ids[:: max(1, len(ids) // _SAMPLED_USERS)][:_SAMPLED_USERS]
        requests = [RankingRequest(name) if self._user_ids else RankingRequest(history=[name]) for name in sampled]
        contexts = [self._reader.read_user(request) for request in requests]
        block = self._reader.build_block(contexts, [np.zeros(1, np.int64)] * len(contexts))
        queries = self._scorer.compute_queries(block)
        if queries is None:
            return None
        index = ItemIndex(self._scorer.compute_item_vectors(self._reader.compute_item_features()), queries)
        logger.info("index of %d items for retrieval, recall %.3f", len(self._item_ids), index.recall)
        return index
