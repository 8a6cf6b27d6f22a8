"""User texts: a template over the columns of a file of users, with the rules of item texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.column_checks import require_column
from collm_dist.data.ingest.file_format import LINE_COLUMN
from collm_dist.data.ingest.file_readers import NULLS, BadRows, FileFormat, read_tables
from collm_dist.data.ingest.forgotten_users import load_forgotten
from collm_dist.data.ingest.id_forms import drop_fractions, match_forms
from collm_dist.data.ingest.id_tables import compute_ids_hash, sort_naturally
from collm_dist.data.ingest.input_checks import check_rows, refuse_copies
from collm_dist.data.ingest.item_texts import clean_text, fill_template, list_template_columns
from collm_dist.data.ingest.lake_tables import LakeTable, open_lake_table
from collm_dist.data.ingest.normalize import to_ids, to_text
from collm_dist.data.ingest.source import read_first
from collm_dist.data.shards.manifest import USER_TEXTS
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.storage import describe_files, list_files

MAX_PREVIEW_BYTES, MAX_SAMPLES = 256 << 20, 3
WITHOUT_ID, OTHER_TEXT = "rows without an id", "rows of a user with another text"
# Ids of no users.
NOBODY = pa.array([], pa.string())
NO_MATCH = "no user of the log has a text in dataset.users_path: check dataset.columns.user and dataset.user_text"


@dataclass(frozen=True)
class UserRows:
    """The users of a user file.

    Attributes:
        texts: text of each user who has one, by id.
        notes: numbers of users by anomaly.
        rows_read: number of rows of the files, with those that are lost.
        bad_rows: rows that are lost.
    """

    texts: dict[str, str]
    notes: Counter[str]
    rows_read: int
    bad_rows: BadRows

    def count(self) -> dict[str, int]:
        """Return numbers of rows and users by anomaly."""
        return dict(sorted((self.notes + self.bad_rows.counts).items()))


@dataclass(frozen=True)
class UserFile:
    """Files of users (``dataset.users_path``), opened and checked.

    Attributes:
        uris: the files.
        file_format: their format.
        id_column: name of the column of ids.
        template: user text, with column names in braces.
    """

    uris: tuple[str, ...]
    file_format: FileFormat
    id_column: str
    template: str

    @property
    def table(self) -> LakeTable | None:
        """Lakehouse table whose files these are."""
        return self.file_format.table

    def inputs(self) -> dict[str, Any]:
        """Return the entries of the files, or of the lakehouse table, for fingerprints."""
        if self.table is not None:
            return {"dataset.users_path": self.table.describe()}
        return describe_files(sorted(self.uris))

    def count_bytes(self) -> int:
        """Return the size of all files."""
        if self.table is not None:
            return sum(file.num_bytes for file in self.table.files.values())
        return sum(int(entry["size"] or 0) for entry in self.inputs().values())

    def read(self, known: Any, forgotten: Any = NOBODY) -> UserRows:
        """Return the users of the files.

        Args:
            known: Arrow array of the ids of the log, whose form decides whether 17.0 is 17.
            forgotten: Arrow array of the ids of users whose rows are skipped.

        Raises:
            DataError: a file cannot be read, or lacks a column.
        """
        bad_rows = BadRows()
        tables = ((uri, table) for uri in self.uris for table in read_tables(uri, self.file_format, bad_rows))
        return build_user_texts(tables, self, known, bad_rows, forgotten)

    def check(self, table: Any, uri: str) -> None:
        """Check the columns of a table.

        Raises:
            DataError: a column is missing.
        """
        require_column(self.id_column, table, uri, "dataset.columns.user")
        for name in list_template_columns(self.template, "dataset.user_text"):
            require_column(name, table, uri, "dataset.user_text")


def open_user_file(dataset: DatasetConfig) -> UserFile | None:
    """Find the files of users and check their columns; None without ``dataset.users_path``.

    Raises:
        DataError: a file is missing, has no rows, or lacks a column; the message names the nearest column.
        ConfigError: the template does not parse.
    """
    if dataset.users_path is None or dataset.user_text is None:
        return None
    id_column = dataset.columns.user or dataset.columns.user_id
    columns = list_template_columns(dataset.user_text, "dataset.user_text")
    table = open_lake_table(dataset, "dataset.users_path")
    uris = list_files(dataset.users_path, "dataset.users_path") if table is None else list(table.files)
    file = UserFile(
        tuple(uris),
        FileFormat(
            delimiter=dataset.user_delimiter or dataset.delimiter,
            delimiter_key="dataset.user_delimiter" if dataset.user_delimiter is not None else None,
            names=dataset.user_names or (),
            expected=(id_column, *columns),
            encoding=dataset.encoding or FileFormat().encoding,
            table=table,
        ),
        id_column,
        dataset.user_text,
    )
    if table is None:
        refuse_copies(file.uris, "dataset.users_path")
    whole = file.file_format if table is None else replace(file.file_format, expected=())
    uri, first = read_first(file.uris, whole)
    file.check(first, uri)
    return file


def build_user_texts(
    tables: Iterable[tuple[str, Any]], file: UserFile, known: Any, bad_rows: BadRows, forgotten: Any = NOBODY
) -> UserRows:
    """Return the text of each user by id, from the user's first row.

    A user without any value in the template's columns has no text.

    Args:
        tables: raw rows of users and the file that they are from, consumed one by one.
        file: their columns and the template.
        known: Arrow array of the ids of the log.
        bad_rows: has the lines that do not parse once the tables are consumed; gets the other rows that are lost.
        forgotten: Arrow array of the ids of users whose rows are skipped.

    Raises:
        DataError: a table lacks a column.
    """
    texts, num_rows, without_value = dict[str, str | None](), 0, 0
    columns = list_template_columns(file.template, "dataset.user_text")
    for uri, table in tables:
        file.check(table, uri)
        left_out = pc.is_in(drop_fractions(to_ids(table.column(file.id_column))), forgotten.cast(pa.string()))
        table = table.filter(pc.invert(left_out))
        num_rows += table.num_rows
        ids = match_forms(to_ids(table.column(file.id_column)), known)
        missing = pc.is_in(ids, pa.array([*NULLS, None])).to_pylist()
        values = {name: to_text(table.column(name)).to_pylist() for name in columns}
        lines = table.column(LINE_COLUMN)
        for position, user_id in enumerate(ids.to_pylist()):
            if missing[position]:
                bad_rows.add(WITHOUT_ID, 1, f"{uri}:{lines[position]}")
                continue
            cleaned = {name: clean_text(column[position]) for name, column in values.items()}
            text = clean_text(fill_template(file.template, cleaned)) if any(cleaned.values()) else None
            if user_id not in texts:
                texts[user_id] = text
                without_value += not text
            elif texts[user_id] != text:
                bad_rows.add(OTHER_TEXT, 1, f"{uri}:{lines[position]}", ascii(user_id))
    num_rows += bad_rows.counts.total() - bad_rows.counts[WITHOUT_ID] - bad_rows.counts[OTHER_TEXT]
    kept = {user_id: text for user_id, text in texts.items() if text}
    return UserRows(kept, +Counter({"users without any value": without_value}), num_rows, bad_rows)


def write_user_texts(data_dir: Path, dataset: DatasetConfig, user_ids: Sequence[str], forgotten: Any) -> dict[str, Any]:
    """Read the file of users and write ``user_texts.parquet``, with users who have no rows in the log after the others.

    Args:
        data_dir: the data folder.
        dataset: the settings.
        user_ids: raw ids of the run's users in the order of their indices.
        forgotten: Arrow array of the ids of forgotten users, who are left out.

    Returns:
        Hash of ids and texts, numbers of users, and of rows by what is unusual, with examples; empty without a file.

    Raises:
        DataError: a file cannot be read, lacks a column, or loses more rows than ``dataset.max_bad_row_share`` allows.
    """
    if (file := open_user_file(dataset)) is None:
        return {}
    users = file.read(pa.array(user_ids, pa.string()), forgotten)
    check_rows(dataset, "dataset.users_path", "user", users.rows_read, users.bad_rows)
    texts = users.texts
    others = sort_naturally(list(set(texts).difference(user_ids)))
    ids = [*user_ids, *others]
    values = [texts.get(user_id) for user_id in ids]
    table = pa.table({"user_id": pa.array(ids, pa.string()), "text": pa.array(values, pa.string())})
    with open_atomic(data_dir / USER_TEXTS, "wb") as target:
        pq.write_table(table, target)
    with_text = sum(text is not None for text in values[: len(user_ids)])
    return {
        "hash": compute_ids_hash(part for pair in zip(ids, values, strict=True) for part in (pair[0], pair[1] or "")),
        "users_with_text": with_text,
        "users_without_text": len(user_ids) - with_text,
        "users_without_rows": len(others),
        "rows": users.count(),
        "examples": users.bad_rows.first,
        **({"table": {"location": file.table.location} | file.table.describe()} if file.table is not None else {}),
    }


def format_user_texts(record: Mapping[str, Any]) -> list[str]:
    """Return the lines that show on the terminal what ``write_user_texts`` returned."""
    lines = [
        f"user texts: {record['users_with_text']:,} users of the log have one, {record['users_without_text']:,} have "
        f"none; {record['users_without_rows']:,} users of the file are not in the log"
    ]
    if not record["users_with_text"]:
        lines.append(f"WARNING: {NO_MATCH}")
    for cause, count in record["rows"].items():
        example = record["examples"].get(cause)
        lines.append(f"user file: {count:,} x {cause}" + (f" (for example {example})" if example else ""))
    return lines


def preview_users(dataset: DatasetConfig, user_ids: Any) -> list[str]:
    """Return lines with the texts of the first users of a log, as the data step reads them; empty without a file.

    Args:
        dataset: the settings.
        user_ids: distinct ids in the rows, an Arrow array.

    Raises:
        DataError: a file cannot be read, or lacks a column.
    """
    if (file := open_user_file(dataset)) is None:
        return []
    if (size := file.count_bytes()) > MAX_PREVIEW_BYTES:
        return [f"user texts: the user file has {size / 2**20:,.0f} MiB; only the data step reads it"]
    users = file.read(user_ids, load_forgotten(dataset.forget))
    texts = users.texts
    known = [user_id for user_id in user_ids.to_pylist() if user_id in texts]
    counts = {
        "users_with_text": len(known),
        "users_without_text": len(user_ids) - len(known),
        "users_without_rows": len(texts) - len(known),
        "rows": users.count(),
        "examples": users.bad_rows.first,
    }
    return [*format_user_texts(counts), *(f"user {user_id}: {texts[user_id]}" for user_id in known[:MAX_SAMPLES])]
