"""State before each row of a log, computed row by row in plain Python: the reference for the vectorised code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One event of a log; ``row`` is its place in the file."""

    row: int
    user: str
    item: str
    time: int
    label: int
    split: str


def compute_known_before(rows: list[Row], ties: str) -> dict[int, dict]:
    """Return by row: history (all likes, oldest first), dislikes, counts and whether user and item occur in train."""
    in_time = sorted(rows, key=lambda one: (one.time, one.row))
    known = {}
    for one in in_time:
        earlier = [other for other in in_time if other.time < one.time]
        seen = earlier if ties == "strict" else [o for o in in_time if (o.time, o.row) < (one.time, one.row)]
        of_user = [other for other in earlier if other.user == one.user]
        of_item = [other for other in earlier if other.item == one.item]
        known[one.row] = {
            "history": [other.item for other in seen if other.user == one.user and other.label],
            "dislikes": [other.item for other in of_user if not other.label],
            "rated": [
                (other.item, other.label)
                for other in in_time
                if other.user == one.user and other in (seen if other.label else earlier)
            ],
            "user_likes": sum(other.label for other in of_user),
            "user_rows": len(of_user),
            "item_likes": sum(other.label for other in of_item),
            "item_rows": len(of_item),
            "user_in_train": int(any(other.user == one.user and other.split == "train" for other in rows)),
            "item_in_train": int(any(other.item == one.item and other.split == "train" for other in rows)),
        }
    return known
