"""Checks of the input: bad rows, ``dataset.expect`` and empty splits, before later steps use the data."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.file_format import PACKED_SUFFIXES, BadRows
from collm_dist.data.ingest.item_texts import ItemCatalogue
from collm_dist.errors import DataError
from collm_dist.storage import split_query

# Of packed files, and of the copies that editors make. Files of different types may well share a table: one a day, say.
_ENDINGS = (*chain.from_iterable(PACKED_SUFFIXES.values()), ".bak", ".orig", "~")
_SUFFIXES = re.compile(rf"({'|'.join(map(re.escape, _ENDINGS))})+$", re.IGNORECASE)


def check_reads(
    dataset: DatasetConfig,
    reads: Sequence[Mapping[str, Any]],
    unknown: Mapping[str, int],
    previous_rows: int,
    warnings: Sequence[str] = (),
) -> None:
    """Check bad rows and ``dataset.expect``.

    Args:
        dataset: the settings.
        reads: statistics of ``ingest_tasks.read_chunk`` for each chunk.
        unknown: number of rows of each item that is missing from the item file.
        previous_rows: raw rows of ``dataset.extend_from``; 0 without one.
        warnings: see ``input_facts.list_warnings``; possible reasons of unusable rows.

    Raises:
        DataError: a check failed; the message has counts, the first examples and the setting to change.
    """
    total = sum(read["rows_read"] for read in reads)
    if total == 0 and not any(read["bad"] for read in reads):
        raise DataError("dataset.path: the input has no rows")
    _check_bad_rows(dataset, reads, unknown, warnings)
    if sum(read["usable"] for read in reads) == 0:
        raise DataError(
            f"dataset: none of the {total} rows can be used: dataset.row_filter, dataset.forget or the window of "
            "dataset.split leave nothing; loosen them"
        )
    expect = dataset.expect
    if total < expect.min_rows:
        raise DataError(
            f"dataset.expect.min_rows: the input has {total} rows, expected at least {expect.min_rows}; complete the "
            "input or lower the setting"
        )
    age = (time.time() - max(read["last"] for read in reads)) / 3600
    if expect.max_age_hours is not None and age > expect.max_age_hours:
        raise DataError(
            f"dataset.expect.max_age_hours: the newest interaction is {age:.1f} hours old, expected at most "
            f"{expect.max_age_hours}; bring newer data or raise the setting"
        )
    if expect.max_row_change_share is not None and previous_rows:
        change = abs(total - previous_rows) / previous_rows
        if change > expect.max_row_change_share:
            raise DataError(
                f"dataset.expect.max_row_change_share: {total} rows against {previous_rows} in dataset.extend_from is "
                f"a change of {change:.0%}, expected at most {expect.max_row_change_share:.0%}; look at the input or "
                "raise the setting"
            )


def _check_bad_rows(
    dataset: DatasetConfig, reads: Sequence[Mapping[str, Any]], unknown: Mapping[str, int], warnings: Sequence[str]
) -> None:
    """Check the share of unusable rows among those that would be used, not among all that were read."""
    bad = sum((Counter[str](read["bad"]) for read in reads), Counter[str]())
    total = bad.total() + sum(read["usable"] for read in reads)
    examples = [line for read in reads for line in read["examples"]][:5]
    if unknown:
        bad["unknown item"] = sum(unknown.values())
        examples += [
            f"item '{item}' is not in the item file ({rows} rows)" for item, rows in sorted(unknown.items())[:5]
        ]
    if bad.total() > dataset.max_bad_row_share * total:
        hints = (
            ("is not a time", " (dates in another form: set dataset.time_format)"),
            ("in scientific notation", " (ids lose digits in it: write them in full)"),
            ("is not a number", " (numbers are written as 4.5, without other marks)"),
            ("is neither 0 nor 1", " (labels are 0 and 1, or true and false)"),
            ("(dataset.row_filter)", " (write number(column) in the filter to leave out values that are not numbers)"),
        )
        hint = "".join(text for part, text in hints if any(part in cause for cause in bad))
        raise DataError(
            f"dataset: {bad.total()} of {total} rows cannot be used ({_list_causes(bad)}), more than "
            f"dataset.max_bad_row_share={dataset.max_bad_row_share} allows; fix the input{hint} or raise "
            "the limit. The first ones:\n  "
            + "\n  ".join(examples)
            + "".join(f"\nPossible reason: {warning}" for warning in warnings)
        )


def check_items(dataset: DatasetConfig, catalogue: ItemCatalogue) -> None:
    """Check the share of unusable rows of the item files; see ``check_rows``."""
    check_rows(dataset, "dataset.items_path", "item", catalogue.rows_read, catalogue.bad_rows)


def refuse_copies(uris: Sequence[str], key: str) -> None:
    """Refuse files whose names differ only in the suffix, as those of a table and of its packed copy.

    Args:
        uris: the files of one table.
        key: the setting that names them, for the message.

    Raises:
        DataError: two files probably have the same rows.
    """
    names: dict[str, str] = {}
    for uri in uris:
        other = names.setdefault(_SUFFIXES.sub("", split_query(uri)[0]), uri)
        if other != uri:
            raise DataError(
                f"{key}: '{other}' and '{uri}' are probably copies of the same rows, which would count twice; remove "
                f"one of them, or set {key} to a file or a glob that leaves it out"
            )


def check_rows(dataset: DatasetConfig, key: str, kind: str, rows_read: int, bad_rows: BadRows) -> None:
    """Check the share of unusable rows of the files of items or users.

    Args:
        dataset: the settings.
        key: the setting that names the files, for the message.
        kind: item or user.
        rows_read: number of rows.
        bad_rows: those that cannot be used.

    Raises:
        DataError: the share exceeds ``dataset.max_bad_row_share``; the message has counts and the first examples.
    """
    bad = bad_rows.counts
    if bad.total() > dataset.max_bad_row_share * rows_read:
        raise DataError(
            f"{key}: {bad.total()} of {rows_read} {kind} rows cannot be used ({_list_causes(bad)}), more than "
            f"dataset.max_bad_row_share={dataset.max_bad_row_share} allows; fix the file or raise the limit. The first "
            "ones:\n  " + "\n  ".join(bad_rows.examples)
        )


def _list_causes(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {cause}" for cause, count in counts.most_common())


def check_filtered_rows(stats: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of rows left by the filters, from what ``filter_bucket`` returned for each bucket.

    Raises:
        DataError: no row is left.
    """
    num_rows = sum(bucket["rows"] for bucket in stats)
    if num_rows == 0:
        raise DataError(
            "dataset: no interaction is left after filters and split windows; loosen dataset.min_*, dataset.max_* or "
            "dataset.split"
        )
    return int(num_rows)


def check_splits(dataset: DatasetConfig, rows: Mapping[str, Counter[str]]) -> None:
    """Check that no split is empty.

    Raises:
        DataError: a split is empty; the message names it and the settings to change.
    """
    for name, counts in rows.items():
        if counts["real_rows"] == 0:
            sizes = ", ".join(f"{split} {count['real_rows']}" for split, count in rows.items())
            remedy = {
                "ratio": "change dataset.split.train_ratio or valid_ratio; rows of one second are never split up",
                "calendar": f"change dataset.split.{name}_months, which count from the data's first month",
                "amazon_book": "this rule needs rows from 2017, two or more in December; choose another method",
                "column": f"the column '{dataset.columns.split}' needs rows with the value '{name}'",
            }[dataset.split.method]
            raise DataError(f"dataset.split: the split '{name}' is empty (rows: {sizes}); {remedy}")
