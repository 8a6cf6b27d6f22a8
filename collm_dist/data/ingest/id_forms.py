"""Forms of ids: whether ids such as 17.0 are numbers, decided once for a column of a source.

A table program that meets a missing id writes all ids of the column as 17.0. If every id of the column, in all files of
the source, is a whole number, then 17.0 is 17. Otherwise ids are texts, such as versions, and stay as they are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.errors import DataError

FRACTION, TEXT = "fraction", "text"
UNDECODED, INVISIBLE, DENORMAL = "undecoded", "invisible", "denormal"
_ODD = {UNDECODED: "\ufffd", INVISIBLE: r"[\x{AD}\x{200B}-\x{200F}\x{202A}-\x{202E}\x{2060}-\x{2064}\x{FEFF}]"}
_DIGITS = r"-?(0|[1-9][0-9]*)"
_PLAIN, _WITH_FRACTION = rf"^{_DIGITS}$", rf"^{_DIGITS}\.0+$"
_TOMBSTONE_MARK = "\x1a"  # ids of logs have no control characters
_KINDS = {"user_id": "user", "item_id": "item"}


def drop_fractions(ids: Any) -> Any:
    """Return an Arrow array of strings with 17 in place of 17.0; other strings are kept."""
    if not pc.any(pc.match_substring(ids, ".0")).as_py():
        return ids
    return pc.if_else(pc.match_substring_regex(ids, _WITH_FRACTION), pc.replace_substring_regex(ids, r"\.0+$", ""), ids)


def note_forms(ids: Any, forms: dict[str, str]) -> None:
    """Note in ``forms`` the first id with a fraction of zero, the first that is not a whole number, and odd ids.

    Args:
        ids: Arrow array of strings without missing values.
        forms: the ids found so far, by ``FRACTION``, ``TEXT``, ``UNDECODED``, ``INVISIBLE`` and ``DENORMAL``.
    """
    ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    _note_odd(ids, forms)
    if len(ids) == 0 or (TEXT in forms and not _may_have_fractions(ids, forms)) or _are_plain(ids):
        return
    has_fraction = pc.match_substring_regex(ids, _WITH_FRACTION)
    is_text = pc.invert(pc.or_(has_fraction, pc.match_substring_regex(ids, _PLAIN)))
    for name, matches in ((FRACTION, has_fraction), (TEXT, is_text)):
        if name not in forms and (first := pc.index(matches, True).as_py()) >= 0:
            forms[name] = ids[first].as_py()


def _note_odd(ids: Any, forms: dict[str, str]) -> None:
    """Note the first id with bytes that are not text, with invisible characters, and not in the normal form NFC."""
    offsets = np.frombuffer(ids.buffers()[1] or b"", np.int32)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(ids.buffers()[2] or b"", np.uint8)
    if len(ids) == 0 or not (data[offsets[0] : offsets[-1]] > 127).any():  # nearly always ASCII
        return
    odd = {name: pc.match_substring_regex(ids, pattern) for name, pattern in _ODD.items() if name not in forms}
    if DENORMAL not in forms:
        odd[DENORMAL] = pc.not_equal(pc.utf8_normalize(ids, form="NFC"), ids)
    for name, matches in odd.items():
        if (first := pc.index(matches, True).as_py()) >= 0:
            forms[name] = ids[first].as_py()


def note_item_forms(ids: Any, forms: dict[str, str]) -> None:
    """Note the forms of the distinct ids of the item files in those of the log.

    If the log's ids are whole numbers, other items with a text as id do not matter, unless the files have 17 and 17.0.
    """
    found: dict[str, str] = {}
    note_forms(ids, found)
    if len(drop_fractions(ids).unique()) == len(ids):
        found.pop(TEXT, None)
    forms.update({**found, **forms})


def _may_have_fractions(ids: Any, forms: Mapping[str, str]) -> bool:
    return FRACTION not in forms and bool(pc.any(pc.match_substring(ids, ".0")).as_py())


def _are_plain(ids: Any) -> bool:
    """Return whether all ids consist of digits, without leading zeros; False says nothing."""
    offsets = np.frombuffer(ids.buffers()[1], np.int32)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(ids.buffers()[2] or b"", np.uint8)
    sizes = np.diff(offsets)
    if sizes.min(initial=1) == 0 or ((data[offsets[0] : offsets[-1]] - np.uint8(ord("0"))) > 9).any():
        return False
    return not ((data[offsets[:-1]] == ord("0")) & (sizes > 1)).any()


def find_whole_columns(forms: Mapping[str, Mapping[str, str]], previous: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """Return the columns in whose ids 17.0 is 17.

    Args:
        forms: for user_id and item_id, the forms of all ids of the source.
        previous: for both, the ids of the run that is extended; ids with fractions there are kept.
    """
    return frozenset(
        name
        for name, found in forms.items()
        if FRACTION in found
        and TEXT not in found
        and not pc.any(pc.match_substring_regex(pa.array(previous.get(name, ()), pa.string()), _WITH_FRACTION)).as_py()
    )


def unify_table(table: Any, columns: Iterable[str]) -> Any:
    """Return a table with 17 in place of 17.0 in some columns."""
    for name in columns:
        table = table.set_column(table.schema.get_field_index(name), name, drop_fractions(table.column(name)))
    return table


def unify_items(items: Any) -> Any:
    """Return a table of ``read_items`` with 17 in place of 17.0, also as a title, and the first row of each."""
    old = items.column("item_id")
    ids = drop_fractions(old)
    columns = dict(zip(items.column_names, items.columns, strict=True)) | {"item_id": ids}
    for name in ("title", "text"):
        columns[name] = pc.if_else(pc.equal(items.column(name), old), ids, items.column(name))
    is_first = ~ids.to_pandas().duplicated().to_numpy()
    return pa.table(columns).filter(pa.array(is_first))


def check_forms(uris: Iterable[str], ids: Iterable[Any], column: str) -> None:
    """Check that no file has the same number as 17 and as 17.0, which may be one id or two.

    Args:
        uris: the file of each array; a file's arrays follow each other or not.
        ids: Arrow arrays of ids as they are written.
        column: user_id or item_id, for messages.

    Raises:
        DataError: a file has both.
    """
    by_file: dict[str, list[Any]] = {}
    for uri, array in zip(uris, ids, strict=True):
        by_file.setdefault(uri, []).extend(array.unique().to_pylist())
    for uri, written in by_file.items():
        first_forms: dict[str, str] = {}
        distinct = list(dict.fromkeys(written))
        for number, raw_id in zip(drop_fractions(pa.array(distinct, pa.string())).to_pylist(), distinct, strict=True):
            if first_forms.setdefault(number, raw_id) != raw_id:
                raise DataError(
                    f"{uri}: there are {_KINDS[column]} ids '{first_forms[number]}' and '{raw_id}', which may be one "
                    f"{_KINDS[column]} or two; write all ids of the column in one form"
                )


def check_extension(forms: Mapping[str, str], ids: Any, previous: Sequence[str], column: str) -> None:
    """Check that ids kept as 17.0 are not those that the run that is extended has as 17.

    Args:
        forms: of the column.
        ids: Arrow array of distinct ids.
        previous: ids of that run.
        column: user_id or item_id, for messages.

    Raises:
        DataError: the message names an id.
    """
    if FRACTION not in forms or not previous:
        return
    known, unified = pa.array(previous, pa.string()), drop_fractions(ids)
    clash = pc.and_(pc.is_in(unified, known), pc.invert(pc.is_in(ids, known)))
    if (first := pc.index(clash, True).as_py()) >= 0:
        raise DataError(
            f"dataset.extend_from: the {_KINDS[column]} '{ids[first]}' of the log is probably '{unified[first]}' of "
            f"the run that is extended, but the log also has {_KINDS[column]} ids that are not whole numbers "
            f"({forms.get(TEXT)!a}), so that ids are kept as they are written; write '{unified[first]}'"
        )


def describe_forms(forms: Mapping[str, Mapping[str, str]], whole: Iterable[str]) -> list[str]:
    """Return a sentence for each column in which ids with fractions are read as whole numbers."""
    return [
        f"all {_KINDS[name]} ids are whole numbers, so an id such as '{forms[name][FRACTION]}' is read as "
        f"'{drop_fractions(pa.array([forms[name][FRACTION]]))[0]}'"
        for name in sorted(whole)
    ]


def warn_of_forms(forms: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a sentence for each column in which ids with fractions were kept, and for each kind of odd ids."""
    sentences = []
    for name, found in forms.items():
        kind = _KINDS[name]
        other = f"written otherwise it would be another {kind}"
        if FRACTION in found and TEXT in found:
            sentences.append(
                f"{kind} ids such as '{found[FRACTION]}' are kept as they are written, because not all are whole "
                f"numbers ({found[TEXT]!a}); without the fraction it would be another {kind}"
            )
        if UNDECODED in found:
            sentences.append(
                f"{kind} ids such as {found[UNDECODED]!a} have bytes that do not fit the encoding, so several {kind}s "
                "may be read as one; set dataset.encoding, for example latin1"
            )
        if INVISIBLE in found:
            sentences.append(f"{kind} ids such as {found[INVISIBLE]!a} have invisible characters; {other}")
        if DENORMAL in found:
            sentences.append(
                f"{kind} ids such as {found[DENORMAL]!a} are not in the normal form NFC of Unicode; {other}"
            )
    return sentences


def are_whole(ids: Any) -> bool:
    """Return whether an Arrow array has ids, and all of them are whole numbers without a fraction.

    The ids that replace those of forgotten users do not count.
    """
    ids = ids.filter(pc.invert(pc.starts_with(ids, _TOMBSTONE_MARK)))
    return len(ids) > 0 and bool(pc.all(pc.match_substring_regex(ids, _PLAIN)).as_py())


def match_forms(ids: Any, known: Any) -> Any:
    """Return ids from outside the log, with 17 in place of 17.0 if the run's ids are whole numbers.

    Args:
        ids: Arrow array of strings.
        known: Arrow array of the run's ids.
    """
    unified = drop_fractions(ids)
    return unified if unified is not ids and are_whole(known) else ids


class IdIndex(dict[str, int]):
    """Dense index of each raw id of a run."""

    def __init__(self, ids: Sequence[str]) -> None:
        """Number the ids."""
        super().__init__((raw_id, index) for index, raw_id in enumerate(ids))
        self._are_whole = are_whole(pa.array(ids, pa.string()))

    def find(self, raw_id: str) -> int | None:
        """Return the index of an id from outside the log, or None. If all ids are whole numbers, 17.0 is 17."""
        return self.get(self.spell(raw_id))

    def spell(self, raw_id: str) -> str:
        """Return an id from outside the log as the run has it; an unknown id as it is."""
        if raw_id in self or not self._are_whole or ".0" not in raw_id:
            return raw_id
        # Not by Arrow, which takes 30 µs for a string and refuses half a surrogate pair.
        unified = raw_id.rstrip("0").removesuffix(".") if re.fullmatch(_WITH_FRACTION, raw_id) else raw_id
        return unified if unified in self else raw_id
