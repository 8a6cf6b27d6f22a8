"""Search of items by title: an index in memory, built once."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from collm_dist.data.shards.context_block import IntArray

# Titles that a search looks at before it ends: a bound on its time if one word is frequent and another is not.
_MAX_LOOKED_AT = 50_000


@dataclass(frozen=True)
class FoundItem:
    """An item that a search found.

    Attributes:
        item_id: raw id.
        title: title of the item.
        likes: number of likes in the log.
    """

    item_id: str
    title: str
    likes: int


class ItemSearch:
    """Titles of all items without case and accents, most liked first.

    Every word of a query must occur in the title. An item whose id is the query comes first, then titles that begin
    with the query, have it at the beginning of a word, or anywhere, then the same with its longest word.
    """

    def __init__(
        self, item_ids: Sequence[str], titles: Sequence[str], likes: IntArray, item_index: Mapping[str, int]
    ) -> None:
        """Build the index: (N,) raw ids, titles and numbers of likes, and the index of each raw id."""
        self._item_ids, self._titles, self._likes, self._item_index = item_ids, titles, likes, item_index
        self._order = np.argsort(-likes, kind="stable")
        self._places = np.argsort(self._order)
        folded = [" ".join(fold(titles[index]).split()) for index in self._order.tolist()]
        # A single string, in which str.find looks for a word at the speed of memory; titles begin after "\n ".
        self._text = "".join(f"\n {title}" for title in folded) + "\n"
        self._starts = list(accumulate((len(title) + 2 for title in folded), initial=0))

    def find(self, query: str, limit: int) -> tuple[list[FoundItem], bool]:
        """Return the items that match a query, and whether there are more.

        Args:
            query: words or an item's id; empty = all items.
            limit: most items to return.
        """
        places: dict[int, None] = {}
        for place in self._iterate(query.strip(), fold(query).split()):
            places.setdefault(place)
            if len(places) > limit:
                break
        indices = self._order[list(places)].tolist()
        found = [FoundItem(self._item_ids[index], self._titles[index], int(self._likes[index])) for index in indices]
        return found[:limit], len(found) > limit

    def _iterate(self, item_id: str, words: Sequence[str]) -> Iterator[int]:
        """Yield the places of matching items, best first, some repeatedly."""
        if not words:
            yield from range(len(self._order))
            return
        if item_id in self._item_index:
            yield int(self._places[self._item_index[item_id]])
        looked_at = 0
        for key in (prefix + part for part in (" ".join(words), max(words, key=len)) for prefix in ("\n ", " ", "")):
            position = self._text.find(key)
            while position >= 0 and looked_at < _MAX_LOOKED_AT:
                looked_at += 1
                place = bisect_right(self._starts, position) - 1
                end = self._starts[place + 1]
                if all(self._text.find(word, self._starts[place], end) >= 0 for word in words):
                    yield place
                position = self._text.find(key, end)


def fold(text: str) -> str:
    """Return a text without case and accents."""
    if text.isascii():
        return text.lower()
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(character for character in decomposed if not unicodedata.combining(character))
