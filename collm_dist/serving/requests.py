"""Requests and answers of a recommender, and the reader that turns raw ids into context blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.ingest.id_forms import IdIndex
from collm_dist.data.prompts.ragged import to_offsets
from collm_dist.data.samples.pair_features import compute_count_features
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.errors import RequestError
from collm_dist.serving.event_log import EventLog
from collm_dist.serving.fresh_events import FreshEvents
from collm_dist.serving.given_ids import Id, to_id, to_ids, to_whole_number
from collm_dist.serving.received_event import Event
from collm_dist.serving.unknown_ids import UnknownIds, show_ids

# Lists of items of which unknown ids are skipped.
_SKIPPING_FIELDS = ("history", "disliked", "allowed", "blocked")


@dataclass(frozen=True)
class RankingRequest:
    """Input of ``Recommender.score``: a user at a point in time, and given items to score.

    Ids are compared as strings, numbers without a fraction of zero. If all ids of the run are whole numbers, the string
    17.0 is 17 as well.

    Attributes:
        user: raw id; None, or an id that is neither in the run's log nor in its file of users, is an unknown user.
        history: raw ids of liked items, oldest first; None = the user's likes in the log before ``as_of``. Items that
            the run does not know are skipped, because they have neither title nor vector.
        candidates: raw ids of the run's items, without repetition. Items without ratings are valid; ids outside the
            run's item table are not.
        as_of: seconds since 1970; only earlier events of the log count; None = all events.
        disliked: raw ids of disliked items, oldest first; otherwise as ``history``. Where a prompt shows the order of
            likes and dislikes, these are spread evenly between the likes.
        allowed: raw ids among which ``Recommender.retrieve`` finds candidates; None = all items. It skips unknown ids.
        blocked: raw ids that it leaves out; None = none.
        history_labels: 1 = liked, 0 = disliked, for each item of ``history``, which then has both in their order and
            replaces ``disliked``; None = all are liked.
    """

    user: Id | None = None
    history: Sequence[Id] | None = None
    candidates: Sequence[Id] = ()
    as_of: int | None = None
    disliked: Sequence[Id] | None = None
    allowed: Sequence[Id] | None = None
    blocked: Sequence[Id] | None = None
    history_labels: Sequence[int] | None = None


@dataclass(frozen=True)
class RankingQuery:
    """Arguments of ``Recommender.rank``, with optional candidates; ``Recommender`` turns it into a ``RankingRequest``.

    Attributes:
        user, history, as_of, disliked, allowed, blocked, history_labels: see ``RankingRequest``.
        candidates: see there; None = the collaborative model retrieves them.
        top_k: most items to return; None = all.
        num_retrieved: number of candidates to retrieve if none are given.
    """

    user: Id | None = None
    history: Sequence[Id] | None = None
    candidates: Sequence[Id] | None = None
    as_of: int | None = None
    top_k: int | None = None
    num_retrieved: int = 200
    disliked: Sequence[Id] | None = None
    allowed: Sequence[Id] | None = None
    blocked: Sequence[Id] | None = None
    history_labels: Sequence[int] | None = None


HasUser = RankingRequest | RankingQuery


@dataclass(frozen=True)
class RankedItem:
    """An item of a ranking.

    Attributes:
        item_id: raw id.
        score: logit of a like.
        rank: 1 is the best.
        title: title of the item.
    """

    item_id: str
    score: float
    rank: int
    title: str


class Ranking(list[RankedItem]):
    """Ranked items, best first.

    Attributes:
        warnings: what the run does not know of the request, its user or ids of its history; and candidates that are
            left out because they are not available.
    """

    def __init__(self, items: Iterable[RankedItem] = (), warnings: Sequence[str] = ()) -> None:
        """Store the items."""
        super().__init__(items)
        self.warnings = list(warnings)


@dataclass(frozen=True)
class UserContext:
    """A request's user, as the model sees them.

    Attributes:
        user_idx: dense index; -1 = not in the log.
        history: dense indices of liked items, oldest first.
        dislikes: dense indices of the last disliked items, oldest first.
        likes_since: for each of ``dislikes``, the number of items of the whole history after it.
        num_likes, num_rows: number of the user's likes and events in the log.
        seen: dense indices of the items in the request and in the user's events.
        as_of: seconds since 1970.
        text_row: row of the user's text; -1 = none.
    """

    user_idx: int
    history: IntArray
    dislikes: IntArray
    likes_since: IntArray
    num_likes: int
    num_rows: int
    seen: IntArray
    as_of: int
    text_row: int = -1


class RequestReader:
    """Reader of requests: raw ids to dense indices, requests to context blocks.

    An unknown user's statistics are counted from a request that lists likes and dislikes. From a history alone they are
    not: the share of likes would always be 1. In logs without dislikes every event is a like, and a history is counted.

    Attributes:
        item_index: dense index of each raw item id.
    """

    def __init__(
        self,
        user_index: IdIndex,
        item_index: IdIndex,
        events: EventLog,
        *,
        max_history_length: int,
        max_dislikes: int,
        every_event_is_a_like: bool,
        text_rows: IdIndex | None = None,
        fresh: FreshEvents | None = None,
    ) -> None:
        """Store the run's id tables and log.

        Args:
            user_index, item_index: dense index of each raw id.
            events: the log.
            max_history_length, max_dislikes: most liked and most disliked items of a user; the latest are kept.
            every_event_is_a_like: ``dataset.feedback`` is implicit.
            text_rows: row of each raw user id in the user texts, which begin with the users of the log; None = the same
                as ``user_index``.
            fresh: events that count as if they were in the log.
        """
        self._user_index, self.item_index, self._events = user_index, item_index, events
        self._max_history_length, self._max_dislikes = max_history_length, max_dislikes
        self._every_event_is_a_like, self._fresh = every_event_is_a_like, fresh
        self._text_rows = user_index if text_rows is None else text_rows

    def reading(self, requests: Iterable[HasUser]) -> AbstractContextManager[None]:
        """Return a context in which the requests can be read, with the fresh events of their users.

        Within another such context, which must have these users as well, it does nothing.
        """
        if self._fresh is None:
            return nullcontext()
        users = [request.user for request in requests if request.user is not None]
        ids = [to_id(user, "user") for user in users if isinstance(user, str) or to_whole_number(user) is not None]
        return self._fresh.reading(map(self._user_index.spell, ids))

    def spell_ids(self, event: Event) -> Event:
        """Return an event with its ids as the run has them."""
        return replace(event, user=self._user_index.spell(event.user), item=self.item_index.spell(event.item))

    def read_user(self, request: RankingRequest) -> UserContext:
        """Return the context of the request's user.

        Raises:
            RequestError: a field has the wrong type.
        """
        as_of = self._read_time(request.as_of)
        user_id = None if request.user is None else to_id(request.user, "user")
        found = None if user_id is None else self._user_index.find(user_id)
        row = self._text_rows.find(user_id) if user_id is not None and found is None else found
        user_idx, text_row = (-1 if number is None else number for number in (found, row))
        times, items, labels = self._events.find_user_rows(user_idx, as_of)
        if self._fresh is not None and user_id is not None:
            user_id = self._user_index.spell(user_id)
            times, items, labels = self._fresh.add_user_events(user_id, as_of, (times, items, labels))
        is_known = user_idx >= 0 or len(items) > 0
        if self._events.first_as_of is not None and not is_known and user_id is not None and request.history is None:
            raise RequestError(
                f"user: {user_id!r} may be a user of the log, but this run was exported without users and events; give "
                "history, or rank with the original run"
            )
        likes, rows, seen = int(labels.sum()), len(labels), items
        if request.history_labels is not None:
            items, labels = self._read_labelled(request, request.history_labels)
            seen = np.concatenate([seen, items])
        history, dislikes = items[labels == 1], items[labels == 0]
        likes_since = len(history) - np.cumsum(labels, dtype=np.int64)[labels == 0]
        if request.history_labels is None and request.history is not None:
            history = self._find_items(request.history, "history")
            seen = np.concatenate([seen, history])
        if request.disliked is not None:
            dislikes = self._find_items(request.disliked, "disliked")
            seen = np.concatenate([seen, dislikes])
        if request.history_labels is None and (request.history is not None or request.disliked is not None):
            likes_since = _spread(len(dislikes), len(history))
        if not is_known and request.history is not None:
            if self._every_event_is_a_like:
                likes = rows = len(history)
            elif request.disliked is not None or request.history_labels is not None:
                likes, rows = len(history), len(history) + len(dislikes)
        kept = slice(max(0, len(dislikes) - self._max_dislikes), None)
        shown = history[-self._max_history_length :]
        return UserContext(user_idx, shown, dislikes[kept], likes_since[kept], likes, rows, seen, as_of, text_row)

    def read_pool(self, request: RankingRequest, seen: IntArray) -> tuple[IntArray | None, IntArray]:
        """Return the dense indices of a request's allowed items, None for all, and those of items to leave out.

        Args:
            request: the request.
            seen: dense indices of the items that the user has already.

        Raises:
            RequestError: a field has the wrong type.
        """
        allowed = None if request.allowed is None else np.unique(self._find_items(request.allowed, "allowed"))
        return allowed, np.union1d(
            seen, self._find_items(() if request.blocked is None else request.blocked, "blocked")
        )

    def find_unknown(self, request: RankingRequest) -> UnknownIds:
        """Return the ids of a request, candidates aside, that the run does not know.

        Raises:
            RequestError: a field has the wrong type.
        """
        user = None if request.user is None else to_id(request.user, "user")
        lists = {field: getattr(request, field) for field in _SKIPPING_FIELDS}
        given = {field: to_ids(ids, field) for field, ids in lists.items() if ids is not None}
        unknown = {
            field: [item_id for item_id in ids if self.item_index.find(item_id) is None] for field, ids in given.items()
        }
        return UnknownIds(
            None if user is None or self._knows_user(user) else user,
            {field: ids for field, ids in unknown.items() if ids},
            {field: len(ids) for field, ids in given.items()},
        )

    def _knows_user(self, user: str) -> bool:
        if any(ids.find(user) is not None for ids in (self._user_index, self._text_rows)):
            return True
        return self._fresh is not None and self._fresh.has_events(self._user_index.spell(user))

    def _read_labelled(self, request: RankingRequest, values: Sequence[int]) -> tuple[IntArray, NDArray[np.int8]]:
        """Return the dense indices of the items in a request's history that the run knows, and their labels."""
        if request.history is None or request.disliked is not None:
            raise RequestError(
                "history_labels: they say which items of history are liked, so give history and leave out disliked"
            )
        item_ids = to_ids(request.history, "history")
        labels = list(values) if hasattr(values, "__iter__") else [values]
        if wrong := [label for label in labels if not isinstance(label, int | np.integer) or label not in (0, 1)]:
            raise RequestError(f"history_labels: {wrong[0]!r} is neither 1 (liked) nor 0 (disliked)")
        if len(labels) != len(item_ids):
            raise RequestError(
                f"history_labels: {len(labels)} labels for {len(item_ids)} items of history; give one for each"
            )
        known = np.array([self.item_index.find(item_id) is not None for item_id in item_ids], dtype=bool)
        return self._find_items(item_ids, "history"), np.array(labels, dtype=np.int8)[known]

    def _find_items(self, values: Sequence[Id], field: str) -> IntArray:
        """Return the dense indices of the items in a list of ids that the run knows."""
        found = [self.item_index.find(item_id) for item_id in to_ids(values, field)]
        return np.array([index for index in found if index is not None], np.int64)

    def read_candidates(self, request: RankingRequest) -> IntArray:
        """Return the (N,) dense indices of a request's candidates.

        Raises:
            RequestError: the list is empty, or an item is unknown or repeated; the message names it.
        """
        item_ids = to_ids(request.candidates, "candidates")
        if not item_ids:
            raise RequestError("candidates: the list is empty; give at least one item")
        indices = [self.item_index.find(item_id) for item_id in item_ids]
        if unknown := [item_id for item_id, index in zip(item_ids, indices, strict=True) if index is None]:
            raise RequestError(
                f"candidates: {len(unknown)} of {len(item_ids)} ids are not in the run's item table "
                f"({show_ids(unknown)}); remove them, or add the items to dataset.items_path and extend the run with "
                "dataset.extend_from"
            )
        if len(set(indices)) < len(indices):
            repeated = next(item_ids[place] for place, index in enumerate(indices) if index in indices[:place])
            raise RequestError(f"candidates: {repeated!r} occurs twice; list each item once")
        return np.array(indices, dtype=np.int64)

    def _read_time(self, as_of: int | None) -> int:
        if as_of is None:
            return self._events.end if self._fresh is None else max(self._events.end, self._fresh.end)
        if isinstance(as_of, bool) or not isinstance(as_of, int | np.integer):
            raise RequestError(f"as_of: {as_of!r} is not an integer; give seconds since 1970")
        if self._events.first_as_of is not None and as_of < self._events.first_as_of:
            raise RequestError(
                f"as_of: {as_of} is before {self._events.first_as_of}, the end of the log; this run was exported "
                "without events, so earlier counts are not known: leave as_of out"
            )
        return int(np.clip(as_of, -(2**62), 2**62))

    def compute_item_features(self) -> NDArray[np.float32]:
        """Return (I, F) statistics of all items after all events, each with an unknown user."""
        likes, rows = self._events.count_item_events(np.arange(len(self.item_index)), self._events.end)
        return compute_count_features(np.zeros_like(likes), np.zeros_like(likes), likes, rows)

    def count_item_events(self, item_idx: IntArray, as_of: int | None) -> tuple[IntArray, IntArray]:
        """Return (N,) likes and (N,) events of items before a time (seconds since 1970); None = all events."""
        return self._events.count_item_events(item_idx, self._read_time(as_of))

    def build_block(self, users: Sequence[UserContext], candidates: Sequence[IntArray]) -> ContextBlock:
        """Build the block of contexts and their candidates, in the given order, in the form of the shards.

        Row ids number the candidates. Labels are 0 and have no meaning.
        """
        sizes = np.array([len(item_idx) for item_idx in candidates], dtype=np.int64)
        counts = [
            self._count_item_events(item_idx, user.as_of) for user, item_idx in zip(users, candidates, strict=True)
        ]
        rows = np.arange(sizes.sum())
        zeros = np.zeros(len(rows), dtype=np.int64)
        return ContextBlock(
            user_idx=np.array([user.user_idx for user in users], dtype=np.int64),
            num_likes=np.array([user.num_likes for user in users], dtype=np.int64),
            text_rows=np.array([user.text_row for user in users], dtype=np.int64),
            history_offsets=to_offsets(np.array([len(user.history) for user in users], dtype=np.int64)),
            history_items=np.concatenate([user.history for user in users]).astype(np.int64),
            target_offsets=to_offsets(sizes),
            item_idx=np.concatenate(candidates),
            timestamp=np.repeat([user.as_of for user in users], sizes),
            user_likes=np.repeat([user.num_likes for user in users], sizes),
            user_rows=np.repeat([user.num_rows for user in users], sizes),
            item_likes=np.concatenate([likes for likes, _ in counts]),
            item_rows=np.concatenate([events for _, events in counts]),
            row_id=rows,
            group_id=rows,
            label=zeros,
            sampled=zeros,
            user_in_train=zeros,
            item_in_train=zeros,
            dislike_offsets=to_offsets(np.repeat([len(user.dislikes) for user in users], sizes)),
            dislike_items=np.concatenate(
                [np.tile(user.dislikes, size) for user, size in zip(users, sizes, strict=True)]
            ),
            likes_since=np.concatenate(
                [np.tile(user.likes_since, size) for user, size in zip(users, sizes, strict=True)]
            ),
        )

    def _count_item_events(self, item_idx: IntArray, as_of: int) -> tuple[IntArray, IntArray]:
        likes, rows = self._events.count_item_events(item_idx, as_of)
        if self._fresh is None:
            return likes, rows
        more_likes, more_rows = self._fresh.count_item_events(item_idx, as_of)
        return likes + more_likes, rows + more_rows


def _spread(num_dislikes: int, num_likes: int) -> IntArray:
    """Return the likes since each dislike if dislikes are spread evenly between likes."""
    return num_likes - (2 * np.arange(num_dislikes) + 1) * num_likes // (2 * max(num_dislikes, 1))
