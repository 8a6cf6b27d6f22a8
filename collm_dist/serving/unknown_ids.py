"""Ids of requests that a run does not know, and the warnings about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MAX_SHOWN_IDS = 5


@dataclass(frozen=True)
class UnknownIds:
    """Ids of a request that the run does not know.

    Attributes:
        user: the user's id; None = it is known, or none is given.
        items: unknown item ids, by field of the request.
        given: number of ids in each of these fields.
    """

    user: str | None
    items: dict[str, list[str]]
    given: dict[str, int]

    def list_warnings(self) -> list[str]:
        """Return a sentence for each field with unknown ids."""
        warnings = []
        if self.user is not None:
            warnings.append(f"user: {self.user!r} is not in the run's log; the items are ranked for an unknown user")
        for field, ids in self.items.items():
            warnings.append(
                f"{field}: {len(ids)} of {self.given[field]} ids are not in the run's item table and are skipped "
                f"({show_ids(ids)})"
            )
        return warnings


def show_ids(ids: Sequence[str]) -> str:
    """Return the first ids as they are shown in messages."""
    return ", ".join(map(repr, ids[:_MAX_SHOWN_IDS])) + (", ..." if len(ids) > _MAX_SHOWN_IDS else "")
