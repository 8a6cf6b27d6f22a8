"""Texts of a context in prompts: titles of the history, of rated and disliked items, and the user's text.

Shapes: C contexts, N targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from collm_dist.data.prompts import title_lists
from collm_dist.data.prompts.prompt_template import PromptTemplate
from collm_dist.data.prompts.ragged import Ragged, join_columns
from collm_dist.data.shards.context_block import ContextBlock, IntArray


@dataclass(frozen=True)
class ShownItems:
    """Items in the prompts of a block, oldest first, and the numbers of items dropped because prompts were too long.

    Attributes:
        history, disliked: (C rows) items.
        rated: (C rows) values of ``title_lists.take_context_ratings``.
        dropped: by field.
    """

    history: Ragged
    rated: Ragged
    disliked: Ragged
    dropped: dict[str, int]


class ContextTexts:
    """Chooses and lays out the texts of contexts within a budget of tokens.

    The history comes first: rated items get the room that it leaves, and disliked items the rest.

    Attributes:
        num_fixed: tokens of the lists other than the history if they are empty.
        num_least: tokens of an empty history and the longest user text.
    """

    def __init__(
        self,
        template: PromptTemplate,
        titles: Ragged,
        users: Ragged | None,
        tokenize: Callable[[str], list[int]],
        *,
        tokens_per_slot: int,
        history_length: int,
        disliked_length: int,
        rated_length: int,
        empty_history_text: str,
        empty_dislikes_text: str | None,
        rated_marks: tuple[str, str],
    ) -> None:
        """Tokenize the texts of empty lists.

        Args:
            template, tokens_per_slot: of the prompt.
            titles: token ids of all items.
            users: token ids of user texts, the last one for users without a text; None = the prompt has none.
            tokenize: returns the token ids of a text.
            history_length, disliked_length, rated_length: most items in each list.
            empty_history_text: text in place of an empty history or list of rated items.
            empty_dislikes_text: text in place of an empty list of dislikes; None = ``empty_history_text``.
            rated_marks: texts after a liked and a disliked title in the list of rated items.
        """
        self._template, self._titles, self._users = template, titles, users
        self._tokens_per_slot, self._history_length = tokens_per_slot, history_length
        self._disliked_length = disliked_length if template.has("<DislikedTitleList>") else 0
        self._rated_length = rated_length if template.has("<RatedTitleList>") else 0
        no_dislikes = empty_history_text if empty_dislikes_text is None else empty_dislikes_text
        self._no_dislikes = tokenize(no_dislikes) if self._disliked_length else []
        self._no_ratings = tokenize(empty_history_text) if self._rated_length else []
        self._separator = tokenize(", ")
        self._empty = tokenize(empty_history_text) if template.has("<ItemTitleList>") else []
        marks = [tokenize(mark) for mark in reversed(rated_marks)]
        self._marks = Ragged(np.cumsum([0, *map(len, marks)]), np.array([token for mark in marks for token in mark]))
        self.num_fixed = len(self._no_dislikes) + len(self._no_ratings)
        self.num_least = len(self._empty) + (0 if users is None else int(users.lengths.max()))

    def cut(self, block: ContextBlock) -> ContextBlock:
        """Return the block with contexts cut where the rated or disliked items in the prompt change."""
        if self._rated_length:
            block = block.cut_where_changed(title_lists.hash_ratings(block, self._rated_length))
        if self._disliked_length:
            block = block.cut_where_changed(title_lists.hash_dislikes(block, self._disliked_length))
        return block

    def choose(self, block: ContextBlock, budget: int) -> ShownItems:
        """Return the items in each prompt.

        Args:
            block: contexts, cut by ``cut``.
            budget: tokens of the history, the user's text, and of lists beyond ``num_fixed``.
        """
        room = np.full(block.num_contexts, budget)
        if self._users is not None:
            room = room - self._users.lengths[self._find_users(block)]
        history = Ragged(block.history_offsets, block.history_items)
        history = history.take_last(np.full(block.num_contexts, self._history_length))
        cost = np.full(len(history.values), self._tokens_per_slot if self._template.has("<ItemIDList>") else 0)
        first = 0
        if self._template.has("<ItemTitleList>"):
            first = len(self._separator)
            cost = cost + self._titles.lengths[history.values] + first
        shown, dropped = title_lists.take_newest(history, cost, room + first)
        used = _sum_rows(shown, cost[_find_kept(history, shown)])
        room = room - np.where(shown.lengths > 0, used - first, len(self._empty))
        rated, room, dropped_rated = self._choose_more(
            block, room, self._rated_length, title_lists.take_context_ratings, self._lay_out_rated, self._no_ratings
        )
        disliked, _, dropped_dislikes = self._choose_more(
            block, room, self._disliked_length, title_lists.take_context_dislikes, self._titles.take, self._no_dislikes
        )
        counts = {
            "<ItemTitleList>": dropped,
            "<RatedTitleList>": dropped_rated,
            "<DislikedTitleList>": dropped_dislikes,
        }
        return ShownItems(shown, rated, disliked, counts)

    def _choose_more(
        self,
        block: ContextBlock,
        room: IntArray,
        length: int,
        take: Callable[[ContextBlock, int], Ragged],
        lay_out: Callable[[IntArray], Ragged],
        empty: list[int],
    ) -> tuple[Ragged, IntArray, int]:
        """Return the newest items of a list that fit, the (C,) room left, and the number of items dropped."""
        if not length:
            return Ragged(np.zeros(block.num_contexts + 1, dtype=np.int64), np.zeros(0, dtype=np.int64)), room, 0
        items, free = take(block, length), len(empty) + len(self._separator)
        cost = lay_out(items.values).lengths + len(self._separator)
        shown, dropped = title_lists.take_newest(items, cost, room + free)
        used = _sum_rows(shown, cost[_find_kept(items, shown)])
        return shown, room - np.where(shown.lengths > 0, used - free, 0), dropped

    def lay_out(self, field: str, block: ContextBlock, shown: ShownItems) -> Ragged:
        """Return the (C rows) tokens of a field."""
        if field == "<UserText>":
            assert self._users is not None
            return self._users.take(self._find_users(block))
        if field == "<RatedTitleList>":
            entries = self._lay_out_rated(shown.rated.values)
            return title_lists.list_entries(shown.rated, entries, self._separator, self._no_ratings)
        items, empty = (
            (shown.history, self._empty) if field == "<ItemTitleList>" else (shown.disliked, self._no_dislikes)
        )
        return title_lists.list_entries(items, self._titles.take(items.values), self._separator, empty)

    def _lay_out_rated(self, values: IntArray) -> Ragged:
        """Return the tokens of titles with their marks."""
        return join_columns([self._titles.take(values // 2), self._marks.take(values % 2)], len(values))

    def _find_users(self, block: ContextBlock) -> IntArray:
        """Return the (C,) rows of the contexts' user texts."""
        assert self._users is not None
        rows = block.user_idx if block.text_rows is None else block.text_rows
        return np.where(rows < 0, len(self._users.offsets) - 2, rows)


def _find_kept(items: Ragged, shown: Ragged) -> IntArray:
    """Return the positions in ``items`` of the values in ``shown``, the last ones of each row."""
    return np.arange(len(shown.values)) + np.repeat(items.offsets[1:] - shown.offsets[1:], shown.lengths)


def _sum_rows(items: Ragged, cost: IntArray) -> IntArray:
    """Return the (C,) sums of the costs of each row's items."""
    return np.bincount(items.rows, cost, minlength=len(items.offsets) - 1).astype(np.int64)
