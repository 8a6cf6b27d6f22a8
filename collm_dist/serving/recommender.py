"""A finished run as a recommender: candidates in, ranked items out.

    recommender = collm_dist.load_recommender("runs/mine")
    recommender.rank(history=["B004", "B017", "B031"], candidates=["B002", "B090"])

Prompts, statistics and vectors come from the functions that training and evaluation use, so a row of the run's test
split gets the score from which the report was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from collm_dist.cf.model_files import load_cf_model
from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.config import Config
from collm_dist.data.shards.context_block import IntArray
from collm_dist.data.shards.interactions import load_item_table, load_user_ids
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import RequestError
from collm_dist.runs.run_dir import RunDir, StageName
from collm_dist.serving.block_scorer import BlockScorer, Scores
from collm_dist.serving.event_log import EventLog
from collm_dist.serving.requests import (
    Id,
    RankedItem,
    RankingQuery,
    RankingRequest,
    RequestReader,
    UserContext,
)
from collm_dist.tuning.loaded_stage import LoadedStage
from collm_dist.tuning.scoring import AUTO_TOKENS
from collm_dist.tuning.stage import get_stage

# Most candidates laid out at once. More would use host memory without better micro-batches.
_MAX_ROWS = 4096


class Recommender:
    """A finished run's model, its id tables and its log. One caller at a time.

    Attributes:
        stage: whose model it is: stage2, or stage1 where there is no stage 2.
        config: the run's settings.
        user_ids, item_ids: raw ids of all that the run knows.
    """

    def __init__(self, config: Config, run_dir: RunDir, stage: StageName, loaded: LoadedStage) -> None:
        """Load the id tables, the log and the collaborative model.

        Args:
            config: the run's settings.
            run_dir: the run's directory.
            stage: stage of the model.
            loaded: the model.

        Raises:
            ArtifactError: an artifact is missing or damaged.
        """
        data_dir = run_dir.step_dir("data")
        manifest = load_manifest(data_dir)
        items = load_item_table(data_dir)
        self.config, self.stage = config, stage
        self.user_ids, self.item_ids, self._titles = load_user_ids(data_dir), items["item_id"], items["title"]
        self._reader = RequestReader(
            {user_id: index for index, user_id in enumerate(self.user_ids)},
            {item_id: index for index, item_id in enumerate(self.item_ids)},
            EventLog.load(data_dir, manifest),
            max_history_length=manifest.max_history_length,
            every_event_is_a_like=manifest.feedback == "implicit",
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

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._scorer.device

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
    ) -> list[RankedItem]:
        """Rank items for a user, the best first.

        Args:
            history, candidates, user, as_of: see ``RankingRequest``. Candidates None: ``retrieve`` finds them.
            top_k: return so many; None = all.
            num_retrieved: how many candidates to retrieve where none are given.

        Raises:
            RequestError: the request is wrong; the message names the field, the value and what to do.
        """
        answer = self.rank_many([RankingQuery(user, history, candidates, as_of, top_k, num_retrieved)])[0]
        if isinstance(answer, RequestError):
            raise answer
        return answer

    def rank_many(self, queries: Sequence[RankingQuery]) -> list[list[RankedItem] | RequestError]:
        """Rank for many at once, in one pass where the device has room; a wrong query spoils none of the others.

        Returns:
            For each query its items, the best first, or what is wrong with it.

        Raises:
            ArtifactError: a score is not finite.
        """
        answers: list[list[RankedItem] | RequestError] = [[] for _ in queries]
        valid: dict[int, RankingRequest] = {}
        for index, query in enumerate(queries):
            try:
                request = self._find_candidates(query)
            except RequestError as error:
                answers[index] = error
                continue
            if request.candidates:  # none are left for a user who has seen everything
                valid[index] = request
        for (index, request), scores in zip(valid.items(), self.score(list(valid.values())), strict=True):
            answers[index] = self.order_items(request.candidates, scores)[: queries[index].top_k]
        return answers

    def _find_candidates(self, query: RankingQuery) -> RankingRequest:
        """Return a query, once it is checked, as a request for scores, with the candidates found if none are given."""
        if query.top_k is not None and query.top_k < 1:
            raise RequestError(f"top_k: {query.top_k} is less than 1; give the number of items wanted, or None for all")
        request = RankingRequest(query.user, query.history, as_of=query.as_of)
        if query.candidates is None:
            return replace(request, candidates=self.retrieve([request], query.num_retrieved)[0])
        indices = self._reader.read_candidates(replace(request, candidates=query.candidates))
        self._reader.read_user(request)
        return replace(request, candidates=[self.item_ids[index] for index in indices.tolist()])

    def order_items(self, candidates: Sequence[Id], scores: Scores) -> list[RankedItem]:
        """Return candidates of this run with their (N,) scores as ranked items; equal scores go by the item table."""
        indices = np.array([self._reader.item_index[str(item_id)] for item_id in candidates])
        order = np.lexsort((indices, -scores))
        return [
            RankedItem(self.item_ids[indices[position]], float(scores[position]), rank, self._titles[indices[position]])
            for rank, position in enumerate(order.tolist(), start=1)
        ]

    def score(self, requests: Sequence[RankingRequest]) -> list[Scores]:
        """Score the candidates of many requests; each user's history is computed once however many there are.

        A score does not depend on what else is scored, up to the rounding of the device's matrix products.

        Args:
            requests: of any number.

        Returns:
            For each request the float64 logits of its candidates, in their order.

        Raises:
            RequestError: a request is wrong; the message names its place in the list.
            ArtifactError: a score is not finite.
        """
        scores: list[Scores] = []
        for users, candidates in self._read_in_parts(requests):
            block = self._reader.build_block(users, candidates)
            scores += np.split(self._scorer.score(block), block.target_offsets[1:-1])
        return scores

    def score_cf(self, requests: Sequence[RankingRequest]) -> list[Scores]:
        """Score the candidates of many requests by the collaborative model alone; otherwise as ``score``.

        Raises:
            RequestError: a request is wrong, or the run has no collaborative model.
        """
        scores: list[Scores] = []
        for users, candidates in self._read_in_parts(requests):
            block = self._reader.build_block(users, candidates)
            scores += np.split(self._scorer.score_by_cf(block), block.target_offsets[1:-1])
        return scores

    def retrieve(self, requests: Sequence[RankingRequest], count: int) -> list[list[str]]:
        """Return the items that the collaborative model puts first for each request's user, the best first.

        Items of the history and of the user's events before ``as_of`` are not among them. Every item of the run is
        scored, so this takes time in proportion to the table of items.

        Args:
            requests: their candidates are not read.
            count: most items for each.

        Raises:
            RequestError: a request or the count is wrong, or the run has no collaborative model.
        """
        if count < 1:
            raise RequestError(f"candidates: {count} items cannot be retrieved; give a number of at least 1")
        retrieved: list[list[str]] = []
        for index, request in enumerate(requests):
            with _naming(index, len(requests)):
                user = self._reader.read_user(request)
            unseen = np.setdiff1d(np.arange(len(self.item_ids)), user.seen)
            if len(unseen) == 0:
                retrieved.append([])
                continue
            scores = self._scorer.score_by_cf(self._reader.build_block([user], [unseen]))
            best = unseen[np.argsort(-scores, kind="stable")[:count]]
            retrieved.append([self.item_ids[index] for index in best.tolist()])
        return retrieved

    def _read_in_parts(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[list[UserContext], list[IntArray]]]:
        """Yield contexts and candidates of neighbouring requests, as many as are laid out at once."""
        users: list[UserContext] = []
        candidates: list[IntArray] = []
        for index, request in enumerate(requests):
            with _naming(index, len(requests)):
                item_idx = self._reader.read_candidates(request)
                user = self._reader.read_user(request)
            if users and sum(map(len, candidates)) + len(item_idx) > _MAX_ROWS:
                yield users, candidates
                users, candidates = [], []
            users.append(user)
            candidates.append(item_idx)
        if users:
            yield users, candidates


@contextmanager
def _naming(place: int, count: int) -> Iterator[None]:
    """Let errors of one of several requests say which one it is."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"request {place}: {error}" if count > 1 else str(error)) from None
