"""Files of ranking requests, checked completely before scoring starts and divided into parts.

A row is ``user_id, candidates[, history, history_labels, disliked, allowed, blocked, labels, as_of]``: an id, lists of
ids, lists of 0 and 1 for history and candidates, and a time (seconds since 1970, or an Arrow timestamp). Null means not
given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from collm_dist.data.ingest.id_forms import match_forms
from collm_dist.errors import RequestError
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.serving.requests import RankingRequest

_IDS, _LABELS = pa.list_(pa.string()), pa.list_(pa.int8())
REQUEST_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("candidates", _IDS),
        ("history", _IDS),
        ("history_labels", _LABELS),
        ("disliked", _IDS),
        ("allowed", _IDS),
        ("blocked", _IDS),
        ("labels", _LABELS),
        ("as_of", pa.int64()),
    ]
)


def list_request_files(path: Path) -> list[Path]:
    """Return the Parquet files of a path: the file itself, or those in a folder, sorted by name.

    Raises:
        RequestError: the path has no Parquet file.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise RequestError(f"--input: {path} is neither a Parquet file nor a folder of them")
    return files


def write_parts(
    files: Sequence[Path],
    folder: Path,
    item_ids: Sequence[str],
    *,
    retrieves: bool,
    rows_per_part: int,
    events_end: int | None = None,
) -> list[int]:
    """Check all rows and stream them to ``part-00000.parquet``, ... in a common schema.

    Args:
        files: files of requests.
        folder: folder of the parts.
        item_ids: raw ids of the run's items.
        retrieves: whether the collaborative model retrieves the candidates; given candidates and labels then serve
            only as ground truth.
        rows_per_part: rows of each part but the last.
        events_end: of a run without users and events, ``Manifest.events_end``: users need a history, and no earlier
            time is known.

    Returns:
        Number of rows of each part.

    Raises:
        RequestError: a file cannot be read, a column is missing or has the wrong type, or a row is invalid; the
            message names file, row (from 0) and field.
    """
    known = pa.array(item_ids, pa.string())
    sizes: list[int] = []
    waiting = REQUEST_SCHEMA.empty_table()
    for path in files:
        for table in _read_checked(path, known, retrieves, events_end):
            waiting = pa.concat_tables([waiting, table])
            while waiting.num_rows >= rows_per_part:
                sizes.append(_write_part(folder, len(sizes), waiting.slice(0, rows_per_part)))
                waiting = waiting.slice(rows_per_part)
    if waiting.num_rows:
        sizes.append(_write_part(folder, len(sizes), waiting))
    if not sizes:
        raise RequestError(f"--input: {files[0]} has no rows; write a row for each user")
    return sizes


def name_part(number: int) -> str:
    """Return the name of a part's file, without suffix."""
    return f"part-{number:05d}"


def _write_part(folder: Path, number: int, table: Any) -> int:
    with open_atomic(folder / f"{name_part(number)}.parquet", "wb") as file:
        pq.write_table(table, file)
    return int(table.num_rows)


def read_part(folder: Path, number: int) -> tuple[list[RankingRequest], list[list[int] | None]]:
    """Return a part's requests, and the labels of their candidates or None."""
    rows = pq.read_table(folder / f"{name_part(number)}.parquet").to_pylist()
    requests = [
        RankingRequest(
            row["user_id"],
            row["history"],
            row["candidates"] or (),
            row["as_of"],
            row["disliked"],
            allowed=row.get("allowed"),
            blocked=row.get("blocked"),
            history_labels=row.get("history_labels"),
        )
        for row in rows
    ]
    return requests, [row["labels"] for row in rows]


def _read_checked(path: Path, known: Any, retrieves: bool, events_end: int | None) -> Iterator[Any]:
    try:
        file = pq.ParquetFile(path)
        names = set(file.schema_arrow.names)
        for name in ("user_id",) if retrieves else ("user_id", "candidates"):
            if name not in names:
                hint = ", or retrieve them with --candidates cf:N" if name == "candidates" else ""
                raise RequestError(
                    f"{path}: column '{name}' is missing (found {', '.join(sorted(names))}); add it{hint}"
                )
        if "labels" in names and "candidates" not in names:
            raise RequestError(f"{path}, field 'labels': labels need a column 'candidates', which is missing")
        first = 0
        for batch in file.iter_batches(1 << 14, columns=[name for name in REQUEST_SCHEMA.names if name in names]):
            table = pa.Table.from_batches([batch]).combine_chunks()
            yield _check(table, known, _Refusal(f"{path}", first), retrieves, events_end)
            first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{path} is not a Parquet file, or is damaged ({error}); write it again") from error


def _check(table: Any, known: Any, refuse: _Refusal, retrieves: bool, events_end: int | None) -> Any:
    """Check a table and return it in ``REQUEST_SCHEMA``."""
    columns = {}
    for field in REQUEST_SCHEMA:
        if field.name not in table.column_names:
            columns[field.name] = pa.nulls(table.num_rows, field.type)
            continue
        column = table.column(field.name).combine_chunks()
        columns[field.name] = _convert(column, field, refuse.path)
    refuse("user_id", columns["user_id"].is_null(), "the id is missing; give every row a user id")
    for name in ("candidates", "history", "disliked", "allowed", "blocked"):
        rows, values = _flatten(columns[name])
        refuse(name, _mark(rows[values.is_null().to_numpy(zero_copy_only=False)], table.num_rows),
               "an id in the list is null; remove it")  # fmt: skip
    for name in () if retrieves else ("allowed", "blocked"):
        refuse(name, columns[name].is_valid(),
               "this limits retrieval, but candidates are given; remove it, or set --candidates cf:N")  # fmt: skip
    if events_end is not None:
        refuse("history", columns["history"].is_null(),
               "this run was exported without users and events; give a history")  # fmt: skip
        refuse("as_of", pc.fill_null(pc.less(columns["as_of"], events_end), False),
               f"this run was exported without events, so nothing is known before {events_end}; give a later time, or "
               "null")  # fmt: skip
    columns["candidates"] = _unify(columns["candidates"], known)
    _check_candidates(columns["candidates"], known, refuse, retrieves)
    _check_labels("labels", columns["labels"], "candidates", columns["candidates"], refuse)
    _check_labels("history_labels", columns["history_labels"], "history", columns["history"], refuse)
    both = pc.and_(pc.is_valid(columns["history_labels"]), pc.is_valid(columns["disliked"]))
    refuse("history_labels", both, "it labels the history's items as liked or disliked, so leave out disliked")
    return pa.table(columns, schema=REQUEST_SCHEMA)


def _unify(lists: Any, known: Any) -> Any:
    """Return lists of item ids in the form of the run's ids."""
    values = match_forms(lists.values, known)
    if values is lists.values or values.equals(lists.values):
        return lists
    return pa.ListArray.from_arrays(lists.offsets, values, mask=lists.is_null())


class _Refusal:
    """Check that raises for the first marked row, given the file and the row of it that is the table's first."""

    def __init__(self, path: str, first: int) -> None:
        self.path, self._first = path, first

    def __call__(self, field: str, marked: Any, message: str) -> None:
        marked = np.asarray(marked)
        if marked.any():
            row = self._first + int(marked.argmax())
            raise RequestError(f"{self.path}, row {row}, field '{field}': {message}")


def _check_candidates(candidates: Any, known: Any, refuse: _Refusal, retrieves: bool) -> None:
    count = len(candidates)
    empty = pc.fill_null(pc.equal(pc.list_value_length(candidates), 0), not retrieves)
    refuse("candidates", empty, "the list is empty; give at least one item, or remove the row")
    rows, values = _flatten(candidates)
    places = pc.index_in(values, known)
    unknown = places.is_null().to_numpy(zero_copy_only=False)
    example = repr(values[int(unknown.argmax())].as_py()) if unknown.any() else ""
    refuse("candidates", _mark(rows[unknown], count),
           f"{example} is not in the run's item table ({unknown.sum()} such ids near this row); remove it, or add "
           "the item to dataset.items_path and extend the run with dataset.extend_from")  # fmt: skip
    keys = rows * len(known) + pc.fill_null(places, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    _, first_places = np.unique(keys, return_index=True)
    repeated = np.setdiff1d(np.arange(len(keys)), first_places)
    refuse("candidates", _mark(rows[repeated], count), "an item occurs twice; list each item once")


def _check_labels(name: str, labels: Any, items_name: str, items: Any, refuse: _Refusal) -> None:
    lengths = [pc.list_value_length(lists) for lists in (labels, items)]
    differs = pc.fill_null(pc.not_equal(*lengths), pc.is_valid(labels))
    count = "candidates" if items_name == "candidates" else f"items in {items_name}"
    refuse(name, differs, f"the number of labels differs from the number of {count}")
    rows, values = _flatten(labels)
    wrong = pc.invert(pc.fill_null(pc.is_in(values, pa.array([0, 1], pa.int8())), False))
    refuse(name, _mark(rows[wrong.to_numpy(zero_copy_only=False)], len(labels)), "a label is not 0 or 1")


def _flatten(lists: Any) -> tuple[NDArray[np.int64], Any]:
    """Return the row of each element, and the elements."""
    return pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64), pc.list_flatten(lists)


def _mark(rows: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    return np.bincount(rows, minlength=count) > 0


def _convert(column: Any, field: Any, path: str) -> Any:
    """Return a column in the type of its field. Ids may be numbers without a fraction."""
    column_type, is_list = column.type, pa.types.is_list(field.type)
    inner = column_type.value_type if is_list and hasattr(column_type, "value_type") else column_type
    if isinstance(inner, pa.DictionaryType):
        inner = inner.value_type
    fits = pa.types.is_null(inner) or pa.types.is_integer(inner)
    if field.type == _LABELS:
        fits = fits or pa.types.is_boolean(inner) or pa.types.is_floating(inner)
    elif field.name == "as_of":
        fits = fits or pa.types.is_timestamp(inner)
    else:
        fits = fits or pa.types.is_string(inner) or pa.types.is_large_string(inner)
        if pa.types.is_floating(inner):  # as which whole numbers are written if one of them is missing
            with suppress(pa.ArrowException):
                column, fits = column.cast(pa.list_(pa.int64()) if is_list else pa.int64()), True
    is_a_list = (
        pa.types.is_list(column_type) or pa.types.is_large_list(column_type) or pa.types.is_fixed_size_list(column_type)
    )
    if pa.types.is_null(column_type) or (fits and is_list == is_a_list):
        try:
            if pa.types.is_timestamp(column_type):
                column = column.cast(pa.timestamp("s", column_type.tz), safe=False)
            return column.cast(field.type)
        except pa.ArrowInvalid as error:
            raise RequestError(f"{path}, field '{field.name}': {error}; correct the value") from None
    expected = {
        "labels": "lists of 0 and 1",
        "history_labels": "lists of 0 and 1",
        "as_of": "integer seconds since 1970, or timestamps",
        "user_id": "ids: strings or integers",
    }.get(field.name, "lists of ids: strings or integers")
    raise RequestError(f"{path}, field '{field.name}': the column has type {column_type}; it must hold {expected}")
