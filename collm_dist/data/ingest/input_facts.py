"""Facts of the input that a person checks before work: times, likes, ratings, titles, and rows as they are understood.

The preview and the data step make them by the same functions. All facts are of usable rows, before any filter.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.id_forms import (
    drop_fractions,
    find_whole_columns,
    note_forms,
    note_item_forms,
    warn_of_forms,
)
from collm_dist.data.ingest.item_windows import read_windows
from collm_dist.data.ingest.normalize import format_time

MAX_SAMPLES = 3
_MAX_USERS = 1000
_MAX_TITLE = 60
_DAY = 86_400
# 1995: hardly any log of interactions is older. Other units and formats usually give 1970.
EARLIEST_TIME = 788_918_400
# By chance one time in a thousand ends with three zeros.
_ROUNDED_SHARE, _MIN_ROUNDED = 0.5, 20
# User and item columns are probably swapped if this share of the user ids are ids of the item file, and clearly more
# than of the item ids. Ids that are numbers from 1 occur in both tables.
_SWAPPED_SHARE, _SWAPPED_MARGIN = 0.5, 0.1


@dataclass
class InputFacts:
    """Facts of the rows read so far; its fields are JSON.

    Attributes:
        rows, likes: numbers of rows.
        first, last: earliest and latest time, seconds since 1970; None without times.
        early, late: rows before 1995, and after tomorrow.
        rounded: rows whose time ends with three zeros and is not a full hour.
        low, high: range of the ratings; None without ratings.
        samples: the first rows: user, item, time and label.
        users: the first distinct user ids.
        forms: for user_id and item_id, see ``id_forms.note_forms``.
    """

    rows: int = 0
    likes: int = 0
    first: int | None = None
    last: int | None = None
    early: int = 0
    late: int = 0
    rounded: int = 0
    low: float | None = None
    high: float | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    forms: dict[str, dict[str, str]] = field(default_factory=lambda: {"user_id": {}, "item_id": {}})

    def add(self, table: Any, ratings: tuple[float, float] | None, *, has_times: bool) -> None:
        """Add usable rows.

        Args:
            table: rows in ``normalize.SCHEMA``.
            ratings: the range of their ratings; None without ratings.
            has_times: whether their timestamps are times.
        """
        if table.num_rows == 0:
            return
        part = InputFacts(rows=table.num_rows, likes=int(pc.sum(table.column("label")).as_py()))
        if ratings is not None:
            part.low, part.high = ratings
        if has_times:
            times = table.column("timestamp").to_numpy()
            part.first, part.last = int(times.min()), int(times.max())
            part.early = int((times < EARLIEST_TIME).sum())
            part.late = int((times > time.time() + _DAY).sum())
            part.rounded = int((times % 1000 == 0)[times % 3600 != 0].sum())
        if len(self.samples) < MAX_SAMPLES:
            rows = table.slice(0, MAX_SAMPLES).to_pylist()
            part.samples = [
                {"user": row["user_id"], "item": row["item_id"], "label": row["label"],
                 "time": row["timestamp"] if has_times else None}
                for row in rows
            ]  # fmt: skip
        if len(self.users) < _MAX_USERS:
            part.users = table.column("user_id").unique().slice(0, _MAX_USERS).to_pylist()
        self.merge(part)
        for name, forms in self.forms.items():
            note_forms(table.column(name), forms)

    def merge(self, other: InputFacts) -> None:
        """Add the facts of later rows."""
        for name in ("rows", "likes", "early", "late", "rounded"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, choose in (("first", min), ("low", min), ("last", max), ("high", max)):
            values = [value for value in (getattr(self, name), getattr(other, name)) if value is not None]
            setattr(self, name, choose(values) if values else None)
        self.samples = (self.samples + other.samples)[:MAX_SAMPLES]
        self.users = list(dict.fromkeys(self.users + other.users))[:_MAX_USERS]
        self.forms = {name: {**other.forms[name], **forms} for name, forms in self.forms.items()}

    def settle_ids(self, items: Any, previous: Mapping[str, Sequence[str]]) -> frozenset[str]:
        """Decide once all rows are read in which columns 17.0 is 17, and write it so in the facts.

        Args:
            items: table of the item file as it is written, or None.
            previous: for user_id and item_id, the ids of the run that is extended.

        Returns:
            The names of these columns.
        """
        if items is not None:
            note_item_forms(items.column("item_id"), self.forms["item_id"])
        whole = find_whole_columns(self.forms, previous)
        for name, key in (("user_id", "user"), ("item_id", "item")):
            if name in whole:
                for sample in self.samples:
                    sample[key] = drop_fractions(pa.array([sample[key]]))[0].as_py()
        if "user_id" in whole:
            self.users = drop_fractions(pa.array(self.users, pa.string())).unique().to_pylist()
        return whole


def merge_facts(reads: Iterable[Mapping[str, Any]]) -> InputFacts:
    """Return the facts of all chunks, given what ``read_chunk`` returned of each; a chunk read by 0.1 has none."""
    facts = InputFacts()
    for read in reads:
        facts.merge(InputFacts(**read.get("facts", {})))
    return facts


def describe_input(
    facts: InputFacts, dataset: DatasetConfig, item_ids: Any, items: Any, users: tuple[int, int]
) -> dict[str, Any]:
    """Return the facts as they are recorded.

    Args:
        facts: of the usable rows.
        dataset: the settings.
        item_ids: distinct ids in the rows, an Arrow array.
        items: table ``item_id, title`` of the item file; None = there is none, or it was not read to its end.
        users: number of distinct users, and of those with a single row.
    """
    titles, shares = _find_titles(items, [sample["item"] for sample in facts.samples]), None
    if items is not None:
        rows = pc.index_in(item_ids, items.column("item_id").combine_chunks())
        found = items.column("title").combine_chunks().take(rows)
        shares = round(float(pc.sum(pc.not_equal(found, item_ids)).as_py() or 0) / max(len(item_ids), 1), 4)
    return {
        "rows": facts.rows,
        "first_time": None if facts.first is None else format_time(facts.first),
        "last_time": None if facts.last is None else format_time(facts.last),
        "like_share": round(facts.likes / max(facts.rows, 1), 4),
        "ratings": None if facts.low is None else [facts.low, facts.high],
        "users": users[0],
        "users_with_one_event_share": round(users[1] / max(users[0], 1), 4),
        "items": len(item_ids),
        "items_with_title_share": shares,
        **_describe_windows(items),
        "sample_rows": [
            {
                **sample,
                "time": None if sample["time"] is None else format_time(sample["time"]),
                "title": titles.get(sample["item"]),
            }
            for sample in facts.samples
        ],
        "warnings": list_warnings(facts, dataset, item_ids, items),
    }


def _describe_windows(items: Any) -> dict[str, int]:
    """Return how many items of the item file have a time of availability, and how many are available now."""
    availability = None if items is None else read_windows(items)
    if availability is None:
        return {}
    available = availability.find_available(int(time.time()))
    return {"items_with_window": int(availability.has_window.sum()), "items_available_now": int(available.sum())}


def _find_titles(items: Any, wanted: list[str]) -> dict[str, str]:
    if items is None:
        return {}
    rows = items.filter(pc.is_in(items.column("item_id"), pa.array(wanted, pa.string())))
    return dict(zip(rows.column("item_id").to_pylist(), rows.column("title").to_pylist(), strict=True))


def list_warnings(facts: InputFacts, dataset: DatasetConfig, item_ids: Any, items: Any) -> list[str]:
    """Return a sentence for each fact that is probably a mistake; arguments as for ``describe_input``."""
    warnings = warn_of_forms(facts.forms)
    if facts.first is not None and facts.last is not None:
        settings = "check dataset.columns.timestamp, dataset.timestamp_unit and dataset.time_format"
        if facts.early:
            warnings.append(
                f"{facts.early:,} of {facts.rows:,} rows have a time before 1995, the earliest "
                f"{format_time(facts.first)} (UTC); {settings}"
            )
        if facts.late:
            warnings.append(
                f"{facts.late:,} of {facts.rows:,} rows have a time after tomorrow, the latest "
                f"{format_time(facts.last)} (UTC); {settings}"
            )
        if facts.rounded >= max(_MIN_ROUNDED, _ROUNDED_SHARE * facts.rows):
            warnings.append(
                f"{facts.rounded:,} of {facts.rows:,} times end with three zeros, as if a table program had cut their "
                "digits (1.6E+09): the order of events is lost; export them as whole numbers or dates"
            )
    if dataset.feedback == "explicit" and facts.rows and facts.likes in (0, facts.rows):
        which = "no row is a like" if facts.likes == 0 else "every row is a like"
        if facts.low is None:
            about = "check dataset.columns.label, and set dataset.feedback=implicit for a log of likes alone"
        else:
            about = (
                f"the ratings are {facts.low:g} to {facts.high:g} and dataset.like_threshold is "
                f"{dataset.like_threshold:g}; change the threshold, or set dataset.feedback=implicit"
            )
        warnings.append(f"{which}: {about}")
    if _describe_windows(items).get("items_available_now") == 0:
        warnings.append(
            "no item of the item file is available now, so rankings would be empty; check "
            "dataset.item_columns.available_from and available_until, dataset.timestamp_unit and dataset.time_format"
        )
    found = (_describe_swapped(facts, item_ids, items), _describe_other_spelling(item_ids, items))
    return [*warnings, *(sentence for sentence in found if sentence is not None)]


def _describe_swapped(facts: InputFacts, item_ids: Any, items: Any) -> str | None:
    if items is None or items.num_rows == 0 or not facts.users or len(item_ids) == 0:
        return None
    known = items.column("item_id").combine_chunks()
    of_users, of_items = (
        float(np.mean(pc.is_in(ids, known).to_numpy(zero_copy_only=False)))
        for ids in (pa.array(facts.users, pa.string()), item_ids)
    )
    if of_users < max(_SWAPPED_SHARE, of_items + _SWAPPED_MARGIN):
        return None
    return (
        f"{of_users:.0%} of the user ids are ids of the item file, and {of_items:.0%} of the item ids: "
        "dataset.columns.user_id and dataset.columns.item_id are probably swapped"
    )


def _describe_other_spelling(item_ids: Any, items: Any) -> str | None:
    """Return a sentence with an example if the item file has most items that it seems to lack, spelled otherwise."""
    if items is None:
        return None
    known = items.column("item_id").combine_chunks()
    unknown = item_ids.filter(pc.invert(pc.is_in(item_ids, known)))
    places = pc.index_in(_simplify(unknown), _simplify(known))
    if 2 * places.null_count > len(unknown) or len(unknown) == 0:
        return None
    first = pc.index(places.is_valid(), True).as_py()
    return (
        f"{len(unknown) - places.null_count:,} of {len(unknown):,} items that the item file lacks are there in another "
        f"spelling, as {known[places[first].as_py()].as_py()!a} instead of {unknown[first].as_py()!a}; write ids alike"
    )


def _simplify(ids: Any) -> Any:
    """Return ids in lower case and normal form, without quotes around them and zeros before them."""
    return pc.utf8_ltrim(pc.utf8_trim(pc.utf8_lower(pc.utf8_normalize(ids, form="NFC")), " '\""), "0")


def describe_row(row: Mapping[str, Any], *, has_time: bool) -> str:
    """Return user, item and time of a row in ``normalize.SCHEMA``, as an example."""
    shown = f"user {row['user_id']}, item {row['item_id']}"
    return f"{shown}, {format_time(row['timestamp'])}" if has_time else shown


def format_facts(record: Mapping[str, Any], dataset: DatasetConfig) -> list[str]:
    """Return the lines that show what ``describe_input`` returned on the terminal."""
    lines = []
    if record["first_time"] is not None:
        lines.append(f"times: {record['first_time']} to {record['last_time']} (UTC)")
    if dataset.feedback == "implicit":
        lines.append("likes: every row (dataset.feedback: implicit)")
    elif record["ratings"] is None:
        lines.append(f"likes: {record['like_share']:.1%} of the rows")
    else:
        low, high = record["ratings"]
        lines.append(f"likes: {record['like_share']:.1%} of the rows; ratings from {low:g} to {high:g}, a like is at "
                     f"least {dataset.like_threshold:g}")  # fmt: skip
    lines.append(f"users: {record['users']:,}, {record['users_with_one_event_share']:.1%} of them with one event only")
    share = record["items_with_title_share"]
    titles = "no item file read, so no titles" if share is None else f"{share:.1%} of them with a title"
    lines.append(f"items: {record['items']:,}, {titles}")
    if "items_with_window" in record:
        lines.append(
            f"availability: {record['items_with_window']:,} items of the item file have a time from or until which "
            f"they are available; {record['items_available_now']:,} items are available now"
        )
    for row in record["sample_rows"]:
        parts = [f"user {row['user']}", f"item {row['item']}", *([row["time"]] if row["time"] else [])]
        parts.append("like" if row["label"] else "dislike")
        title = row["title"] or "no title"
        parts.append(title if len(title) <= _MAX_TITLE else f"{title[:_MAX_TITLE]}...")
        lines.append(f"row: {' | '.join(parts)}")
    return [*lines, *(f"WARNING: {warning}" for warning in record["warnings"])]


def format_dropped(dropped: Mapping[str, int], examples: Mapping[str, str]) -> list[str]:
    """Return a line for each cause of rows that are left out, the most frequent first, with an example if known."""
    by_count = sorted(dropped.items(), key=lambda entry: (-entry[1], entry[0]))
    return [
        f"left out: {count:,} rows, {cause}" + (f" (for example {examples[cause]})" if cause in examples else "")
        for cause, count in by_count
    ]
