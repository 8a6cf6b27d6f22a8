"""A finished run as a recommender: candidates in, ranked items out.

    recommender = collm_dist.load_recommender("runs/mine")
    recommender.rank(history=["B004", "B017", "B031"], candidates=["B002", "B090"])

Prompts, statistics and vectors come from the functions that training and evaluation use, so a row of the run's test
split gets the score from which the report was made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from collm_dist.cf.model_files import load_cf_model
from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.config import Config
from collm_dist.data.ingest.id_forms import IdIndex
from collm_dist.data.shards.availability import Availability
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.data.shards.interactions import load_item_table, load_user_ids, load_user_texts
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import RequestError
from collm_dist.runs.run_dir import RunDir, StageName
from collm_dist.serving.block_scorer import BlockScorer, Scores
from collm_dist.serving.event_log import EventLog
from collm_dist.serving.event_parts import list_read_parts
from collm_dist.serving.fresh_events import EventSource, FreshEvents
from collm_dist.serving.given_ids import Id
from collm_dist.serving.item_search import ItemSearch
from collm_dist.serving.offered_items import OfferedItems
from collm_dist.serving.ranking_comparison import Comparer, Comparison, NamedItem
from collm_dist.serving.received_event import Event
from collm_dist.serving.request_errors import check_count, naming_request
from collm_dist.serving.requests import (
    RankedItem,
    Ranking,
    RankingQuery,
    RankingRequest,
    RequestReader,
    UserContext,
)
from collm_dist.serving.retrieval import Retriever
from collm_dist.serving.unknown_ids import UnknownIds
from collm_dist.tuning.loaded_stage import LoadedStage
from collm_dist.tuning.scoring import AUTO_TOKENS
from collm_dist.tuning.stage import get_stage

logger = logging.getLogger(__name__)

# Most candidates laid out at once. More would use host memory without better micro-batches.
_MAX_ROWS = 4096


class Recommender:
    """A finished run's model, id tables and log. It is not thread-safe.

    Attributes:
        stage: stage of the model: stage2, or stage1 if stage 2 is not done.
        config: the run's settings.
        user_ids, item_ids: raw ids of all users and items of the run.
        kept_contexts: what is kept between requests; None = nothing.
    """

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        stage: StageName,
        loaded: LoadedStage,
        events: EventSource | None = None,
        now: int | None = None,
    ) -> None:
        """Load the id tables, the log and the collaborative model.

        Args:
            config: the run's settings.
            run_dir: the run's directory.
            stage: stage of the model.
            loaded: the model.
            events: store of events that the run has not read; they count as if they were in its log.
            now: seconds since 1970 at which items are available or not; None = the time of each request.

        Raises:
            ArtifactError: an artifact is missing or damaged.
        """
        data_dir = run_dir.step_dir("data")
        manifest = load_manifest(data_dir)
        items, texts = load_item_table(data_dir), load_user_texts(data_dir)
        self.config, self.stage = config, stage
        self.kept_contexts = loaded.model.kept_contexts
        self.user_ids, self.item_ids, self._titles = load_user_ids(data_dir), items["item_id"], items["title"]
        item_index = IdIndex(self.item_ids)
        fresh = None
        if events is not None:
            parts, duplicates = list_read_parts(run_dir), config.dataset.duplicates
            fresh = FreshEvents(
                events,
                self.item_ids,
                item_index,
                read_parts=parts,
                duplicates=duplicates,
                forget=loaded.model.drop_kept,
            )
        self._reader = RequestReader(
            IdIndex(self.user_ids),
            item_index,
            EventLog.load(data_dir, manifest),
            max_history_length=manifest.max_history_length,
            max_dislikes=config.preprocessing.max_dislikes,
            every_event_is_a_like=manifest.feedback == "implicit",
            text_rows=None if texts is None else IdIndex(texts["user_id"]),
            fresh=fresh,
        )
        cf: SlotVectors | None = loaded.model.cf_model
        if config.cf.model == "none":  # id tokens cannot order items by themselves
            cf = None
        elif run_dir.is_done("cf") and (not get_stage(config, stage).has_slots or config.stage2.train_cf):
            # The pretrained model, not the copy that stage 2 has changed.
            cf = load_cf_model(run_dir, manifest).to(loaded.device)
        tokens = config.evaluation.max_tokens_per_micro_batch
        max_tokens = AUTO_TOKENS[loaded.device.type] if tokens == "auto" else tokens
        self._scorer = BlockScorer(stage, loaded, cf, self.item_ids, max_tokens)
        self._offered = OfferedItems(Availability.read(items), now)
        self._retriever = Retriever(self._reader, self._scorer, self.user_ids, self.item_ids, self._offered)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._scorer.device

    def spell_ids(self, event: Event) -> Event:
        """Return an event with its ids as the run has them."""
        return self._reader.spell_ids(event)

    def knows_item(self, item_id: str) -> bool:
        """Return whether an item, as the run spells it, can be ranked."""
        return item_id in self._reader.item_index

    @property
    def has_cf(self) -> bool:
        """Whether the run has a collaborative model that retrieves and orders candidates."""
        return self._scorer.has_cf

    def rank(
        self,
        history: Sequence[Id] | None = None,
        candidates: Sequence[Id] | None = None,
        user: Id | None = None,
        as_of: int | None = None,
        top_k: int | None = None,
        num_retrieved: int = 200,
        disliked: Sequence[Id] | None = None,
        allowed: Sequence[Id] | None = None,
        blocked: Sequence[Id] | None = None,
        history_labels: Sequence[int] | None = None,
    ) -> Ranking:
        """Rank items for a user, best first.

        A user or ids of the history that the run does not know, and candidates that are left out because they are not
        available at ``as_of``, else now, are logged as a warning, and are in ``warnings`` of the answer.

        Args:
            history, candidates, user, as_of, disliked, allowed, blocked, history_labels: see ``RankingRequest``;
                without candidates, ``retrieve`` finds them.
            top_k: most items to return; None = all.
            num_retrieved: number of candidates to retrieve if none are given.

        Raises:
            RequestError: the request is invalid; the message names the field, the value and the remedy.
        """
        query = RankingQuery(
            user, history, candidates, as_of, top_k, num_retrieved, disliked, allowed, blocked, history_labels
        )
        answer = self.rank_many([query])[0]
        if isinstance(answer, RequestError):
            raise answer
        for warning in answer.warnings:
            logger.warning("%s", warning)
        return answer

    def rank_many(self, queries: Sequence[RankingQuery]) -> list[Ranking | RequestError]:
        """Answer many queries, in one pass if the device has room. An invalid query does not affect the others.

        Returns:
            For each query its items, best first, or the error that it causes.

        Raises:
            ArtifactError: a score is not finite.
        """
        with self._reader.reading(queries):
            return self._rank_many(queries)

    def _rank_many(self, queries: Sequence[RankingQuery]) -> list[Ranking | RequestError]:
        answers: list[Ranking | RequestError] = [Ranking() for _ in queries]
        valid: dict[int, RankingRequest] = {}
        for index, query in enumerate(queries):
            try:
                request, warnings = self._to_request(query, lambda request, count: self.retrieve([request], count)[0])
            except RequestError as error:
                answers[index] = error
                continue
            answers[index] = Ranking(warnings=self.find_unknown(request).list_warnings() + warnings)
            if request.candidates:  # empty for a user who has seen everything that is available
                valid[index] = request
        for (index, request), scores in zip(valid.items(), self.score(list(valid.values())), strict=True):
            answer = answers[index]
            assert isinstance(answer, Ranking)
            answer += self.order_items(request.candidates, scores)[: queries[index].top_k]
        return answers

    def find_unknown(self, request: RankingRequest) -> UnknownIds:
        """Return the ids of a request, candidates aside, that the run does not know.

        Raises:
            RequestError: a field has the wrong type.
        """
        return self._reader.find_unknown(request)

    def compare(self, query: RankingQuery) -> Comparison:
        """Rank items by popularity, by the collaborative model and by the language model, with the parts of its scores.

        Without candidates, the best items by the collaborative model and the most liked take turns. ``top_k`` counts
        for each ranking.

        Raises:
            RequestError: the query is invalid; the message names the field, the value and the remedy.
            ArtifactError: a score is not finite.
        """
        with self._reader.reading([query]):
            request, warnings = self._to_request(query, self._retriever.propose)
            comparison = Comparer(self._reader, self._scorer, self._name_item).compare(request, query.top_k)
            return replace(comparison, warnings=comparison.warnings + warnings)

    def _name_item(self, index: int) -> NamedItem:
        return NamedItem(self.item_ids[index], self._titles[index])

    def build_search(self) -> ItemSearch:
        """Build an index of the titles, whose searches may run in any thread."""
        likes, _ = self._reader.count_item_events(np.arange(len(self.item_ids)), None)
        return ItemSearch(self.item_ids, self._titles, likes, self._reader.item_index)

    def _to_request(
        self, query: RankingQuery, find_candidates: Callable[[RankingRequest, int], list[str]]
    ) -> tuple[RankingRequest, list[str]]:
        """Check a query and return it as a request, with the candidates that are found if none are given, and warnings.

        Given candidates that are not available are left out.
        """
        if query.top_k is not None and query.top_k < 1:
            raise RequestError(
                f"top_k: {query.top_k} is less than 1; give the number of items to return, or None for all"
            )
        request = RankingRequest(
            query.user,
            query.history,
            as_of=query.as_of,
            disliked=query.disliked,
            allowed=query.allowed,
            blocked=query.blocked,
            history_labels=query.history_labels,
        )
        if query.candidates is None:
            return replace(request, candidates=find_candidates(request, query.num_retrieved)), []
        if query.allowed is not None or (query.blocked is not None and len(query.blocked)):
            raise RequestError("candidates: allowed and blocked limit what is retrieved; omit them, or candidates")
        indices = self._reader.read_candidates(replace(request, candidates=query.candidates))
        self._reader.read_user(request)  # only to check it
        request = replace(request, candidates=[self.item_ids[index] for index in indices.tolist()])
        offered, left_out = self.leave_out_unavailable(request)
        return offered, self._offered.warn(left_out, len(indices), request.as_of)

    @property
    def has_windows(self) -> bool:
        """Whether the run knows times at which items are available."""
        return self._offered.has_windows

    def leave_out_unavailable(self, request: RankingRequest) -> tuple[RankingRequest, list[str]]:
        """Return a request with those of its candidates that are available at its time, and the ids of the others.

        Raises:
            RequestError: a candidate is unknown or repeated.
        """
        available = self._offered.find(request.as_of)
        if available is None:
            return request, []
        indices = self._reader.read_candidates(request)
        kept, others = indices[available[indices]], indices[~available[indices]]
        request = replace(request, candidates=[self.item_ids[index] for index in kept.tolist()])
        return request, [self.item_ids[index] for index in others.tolist()]

    def order_items(self, candidates: Sequence[Id], scores: Scores) -> list[RankedItem]:
        """Return candidates with (N,) scores as ranked items. Equal scores keep the order of the item table."""
        indices = self._reader.read_candidates(RankingRequest(candidates=candidates))
        order = np.lexsort((indices, -scores))
        return [
            RankedItem(self.item_ids[indices[position]], float(scores[position]), rank, self._titles[indices[position]])
            for rank, position in enumerate(order.tolist(), start=1)
        ]

    def score(self, requests: Sequence[RankingRequest]) -> list[Scores]:
        """Score the candidates of many requests. Each user's history is computed once for all candidates.

        A score does not depend on the other candidates and requests, up to the rounding of matmuls. Items are scored
        whether they are available or not.

        Args:
            requests: any number of requests.

        Returns:
            For each request the float64 logits of its candidates, in their order.

        Raises:
            RequestError: a request is invalid; the message names its index in the list.
            ArtifactError: a score is not finite.
        """
        return self._score_in_parts(requests, self._scorer.score)

    def score_cf(self, requests: Sequence[RankingRequest]) -> list[Scores]:
        """Score the candidates of many requests by the collaborative model alone; otherwise as ``score``.

        Raises:
            RequestError: a request is invalid, or the run has no collaborative model.
        """
        return self._score_in_parts(requests, self._scorer.score_by_cf)

    def _score_in_parts(
        self, requests: Sequence[RankingRequest], score: Callable[[ContextBlock], Scores]
    ) -> list[Scores]:
        scores: list[Scores] = []
        with self._reader.reading(requests):
            for users, candidates in self._read_in_parts(requests):
                block = self._reader.build_block(users, candidates)
                scores += np.split(score(block), block.target_offsets[1:-1])
        return scores

    def retrieve(self, requests: Sequence[RankingRequest], count: int) -> list[list[str]]:
        """Return the best items by the collaborative model for the user of each request, best first.

        Items of the history and of the user's events before ``as_of`` are left out, and items that are not available
        then; without ``as_of``, now. If the model's scores are inner
        products, an index finds the items, see ``ItemIndex``; otherwise every item of the run is scored.

        Args:
            requests: users to retrieve for; their candidates are ignored.
            count: most items per request.

        Raises:
            RequestError: a request or the count is invalid, or the run has no collaborative model.
        """
        check_count(count)
        with self._reader.reading(requests):
            return self._retriever.retrieve(requests, count)

    def _read_in_parts(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[list[UserContext], list[IntArray]]]:
        """Yield contexts and candidates of consecutive requests, up to the rows that are laid out at once."""
        users: list[UserContext] = []
        candidates: list[IntArray] = []
        for index, request in enumerate(requests):
            with naming_request(index, len(requests)):
                item_idx = self._reader.read_candidates(request)
                user = self._reader.read_user(request)
            if users and sum(map(len, candidates)) + len(item_idx) > _MAX_ROWS:
                yield users, candidates
                users, candidates = [], []
            users.append(user)
            candidates.append(item_idx)
        if users:
            yield users, candidates
