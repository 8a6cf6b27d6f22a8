"""Settings of the raw logs."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from collm_dist.config.section import Section, Uri, optional

MAX_MONTHS = 12 * 1000
_CONVERT_COLLM = (
    "'collm' is no longer read directly; convert the authors' pickles once with `python -m "
    "collm_dist.data.convert_collm_release FOLDER_OR_ZIP OUTPUT_DIR`, then use format: table with "
    "dataset.path=OUTPUT_DIR/interactions.parquet, dataset.items_path=OUTPUT_DIR/items.parquet and "
    "dataset.columns={label: label, split: split}, as configs/ml1m_official.yaml does"
)


class ColumnsConfig(Section):
    """Columns of the interaction files. Fixed layouts have names of their own and use these if a file has them."""

    user_id: str = Field("user_id", description="Column of the user's id (number or string).")
    item_id: str = Field("item_id", description="Column of the item's id (number or string).")
    timestamp: str | None = Field(
        "timestamp", description="Column of the time of the event. null: the order of the rows stands for time."
    )
    rating: str | None = Field(None, description="Column of the rating; like = rating >= dataset.like_threshold.")
    label: str | None = Field(None, description="Column of a label, 0/1 or true/false, instead of a rating.")
    split: str | None = Field(
        None, description="Column with the values train, valid and test; required by split.method: column."
    )
    user: str | None = optional("Column of the user's id in the file of users_path; default: as user_id.")


class ItemColumnsConfig(Section):
    """Names of the columns in the item file."""

    item_id: str = Field("item_id", description="Column of the item's id, as in the interactions.")
    title: str = Field("title", description="Column of the item's title.")
    available_from: str | None = optional(
        "Column of the time from which an item may be offered, in the forms of timestamps; an empty cell means always. "
        "Rankings leave out items that are not available; training and evaluation do not read these times."
    )
    available_until: str | None = optional(
        "Column of the time at which an item's availability ends; an empty cell means that it does not end."
    )

    def list_windows(self) -> dict[str, str]:
        """Return the columns of times by the name of their setting."""
        found = {"available_from": self.available_from, "available_until": self.available_until}
        return {name: column for name, column in found.items() if column is not None}


class CatalogConfig(Section):
    """Catalog of Iceberg tables, with pyiceberg's names.

    Other properties, and credentials, stand in ~/.pyiceberg.yaml or in variables of the environment such as
    PYICEBERG_CATALOG__PROD__TOKEN.
    """

    name: str | None = optional("Name of the catalog; default: pyiceberg's default catalog.")
    type: Literal["rest", "sql", "hive", "glue", "dynamodb", "bigquery"] | None = optional(
        "Kind of the catalog, unless pyiceberg's own configuration has it."
    )
    uri: Uri | None = optional("URI of the catalog, for example https://catalog:8181 or sqlite:////data/catalog.db.")
    warehouse: Uri | None = optional("Warehouse of the catalog.")


class SplitConfig(Section):
    """Division of the interactions into train, valid and test."""

    method: Literal["ratio", "calendar", "amazon_book", "column"] = Field(
        "ratio",
        description="ratio: by time, earliest rows first. calendar: windows of whole calendar months, counted from the "
        "first month of the data. amazon_book: CoLLM's rule for the year 2017. column: as columns.split "
        "says.",
    )
    train_ratio: float = Field(0.8, gt=0, lt=1, description="ratio: share of the rows for training, the earliest.")
    valid_ratio: float = Field(
        0.1, gt=0, lt=1, description="ratio: share of the following rows for validation; the rest is the test split."
    )
    train_months: tuple[int, int] = Field(
        (14, 23), description="calendar: first and last month for training, both included; the first month is 0."
    )
    valid_months: tuple[int, int] = Field((24, 28), description="calendar: the same for validation.")
    test_months: tuple[int, int] = Field((29, 33), description="calendar: the same for the test.")

    @model_validator(mode="after")
    def _check(self) -> SplitConfig:
        if self.train_ratio + self.valid_ratio >= 1:
            raise ValueError("train_ratio + valid_ratio must be below 1: the rest is the test split")
        windows = (self.train_months, self.valid_months, self.test_months)
        if any(first > last or first < 0 or last > MAX_MONTHS for first, last in windows):
            raise ValueError(f"a window of months is [first, last] with 0 <= first <= last <= {MAX_MONTHS}")
        if not windows[0][1] < windows[1][0] <= windows[1][1] < windows[2][0]:
            raise ValueError("the windows of months must not overlap and must be in the order train, valid, test")
        return self


class ExpectConfig(Section):
    """Requirements of the input; the run stops before any work if one is not met."""

    min_rows: int = Field(0, ge=0, description="Minimum number of interactions.")
    max_age_hours: float | None = Field(None, gt=0, description="Maximum age of the newest interaction.")
    max_row_change_share: float | None = Field(
        None, gt=0, description="Maximum relative change in the number of rows since dataset.extend_from."
    )


class DatasetConfig(Section):
    """The raw logs: their location and columns, and the rows to use."""

    format: Literal[
        "table",
        "delta",
        "iceberg",
        "movielens_100k",
        "movielens_1m",
        "movielens_32m",
        "recbole",
        "amazon_2018",
        "amazon_2023",
    ] = Field(
        "table",
        description="table: CSV, TSV or Parquet with the columns named below. delta, iceberg: tables of a lakehouse. "
        "recbole: atomic files. The others: the publishers' own layouts.",
    )
    path: Uri | None = Field(
        None,
        description="URI of the interactions: file, folder, glob, s3://, gs://. Fixed layouts: their folder. delta: "
        "the table's folder. iceberg: namespace.table, or the URI of a table's folder or metadata.json.",
    )
    version: int | None = optional(
        "delta: version of the table. Without it, the newest when the data step begins; the run keeps it.", ge=0
    )
    snapshot_id: int | None = optional("iceberg: snapshot of the table. Without it, the current one, as for version.")
    item_version: int | None = optional("The same as version for items_path, if it is a Delta table.", ge=0)
    item_snapshot_id: int | None = optional("The same as snapshot_id for items_path, if it is an Iceberg table.")
    user_version: int | None = optional("The same as version for users_path, if it is a Delta table.", ge=0)
    user_snapshot_id: int | None = optional("The same as snapshot_id for users_path, if it is an Iceberg table.")
    catalog: CatalogConfig = Field(
        default_factory=CatalogConfig, description="Catalog of Iceberg tables that are given as namespace.table."
    )
    asset: str | None = Field(None, description="Name of a known dataset to fetch instead of path: movielens-100k.")
    items_path: Uri | None = Field(
        None, description="URI of the item file (table, delta, iceberg): files, or a Delta or Iceberg table."
    )
    users_path: Uri | None = optional(
        "URI of the user file: CSV, TSV, Parquet or JSON lines, or a Delta or Iceberg table, with a row per user and "
        "columns for user_text."
    )
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig, description="Columns of the interactions.")
    item_columns: ItemColumnsConfig = Field(default_factory=ItemColumnsConfig, description="Columns of the items.")
    row_filter: str | None = Field(
        None,
        description="Keep the rows for which this expression holds, for example: event_type == 'click' and price > 0. "
        "Names of columns that are not words stand in backquotes: `Book-Rating` > 0.",
    )
    feedback: Literal["explicit", "implicit"] = Field(
        "explicit",
        description="explicit: ratings or labels tell likes from dislikes. implicit: every row is a like (click, "
        "purchase), and dislikes are sampled.",
    )
    like_threshold: float = Field(4.0, description="explicit with ratings: minimum rating of a like.")
    timestamp_unit: Literal["auto", "s", "ms", "us", "ns"] = Field(
        "auto", description="Unit of numeric timestamps; auto: by magnitude. Dates need no unit."
    )
    time_format: str | None = optional(
        "Form of the timestamps as directives of Python's strptime, for example '%d/%m/%Y %H:%M'. Without it ISO 8601, "
        "YYYYMMDD and other forms that have one meaning only are read."
    )
    delimiter: str | None = optional(
        "Delimiter of text tables, one or two characters, or tab. Without it: by suffix, else the most frequent of "
        "comma, tab, semicolon and | in the first line. A header without it is refused.",
    )
    item_delimiter: str | None = optional(
        "The same for the item file. Without it: dataset.delimiter if the first line has it, otherwise found as for "
        "the log.",
    )
    user_delimiter: str | None = optional("The same for the user file.")
    header: bool | None = optional("false: text tables of interactions have no header, and names lists their columns.")
    names: tuple[str, ...] | None = optional("Names of the columns of text tables without a header, in order.")
    item_names: tuple[str, ...] | None = optional("The same for the item file, if it has no header.")
    user_names: tuple[str, ...] | None = optional("The same for the user file.")
    encoding: str | None = optional("Encoding of text files, for example latin1, cp1252 or utf-16. Without it: UTF-8.")
    item_text: str = Field(
        "{title}", description="Template of an item's text in a prompt, with item columns in braces."
    )
    user_text: str | None = optional(
        "Template of a user's text in a prompt with <UserText>, with columns of users_path in braces."
    )
    duplicates: Literal["keep", "first", "collapse"] = Field(
        "keep",
        description="Rows with the same user and item. keep: all of them. first: the earliest. collapse: one row at "
        "the earliest time, a like if any of them is.",
    )
    min_user_interactions: int = Field(
        0, ge=0, description="Drop users with fewer rows (one pass, together with the items)."
    )
    max_user_interactions: int | None = Field(None, ge=1, description="Drop users with more rows.")
    min_item_interactions: int = Field(0, ge=0, description="Drop items with fewer rows.")
    max_item_interactions: int | None = Field(None, ge=1, description="Drop items with more rows.")
    max_bad_row_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Stop if a larger share of the rows of the log, of the item file, or of the user file is unusable; "
        "they are counted by cause.",
    )
    split: SplitConfig = Field(default_factory=SplitConfig, description="Division into train, valid and test.")
    negatives_per_positive: int = Field(3, ge=1, description="implicit: sampled dislikes per training like.")
    negative_sampling: Literal["uniform", "popularity"] = Field(
        "uniform",
        description="implicit: distribution of the sampled dislikes. popularity: by the item's earlier real events.",
    )
    expect: ExpectConfig = Field(
        default_factory=ExpectConfig, description="Requirements that are checked before any work."
    )
    extend_from: str | None = Field(
        None, description="Earlier run directory: its user and item indices are kept, and new ids are appended."
    )
    new_events: Uri | None = optional(
        "URI of further interactions with the same columns (format table): the folder parquet of the ranking service's "
        "--events. It may be empty. Parts that arrive after the data step do not make it stale.",
    )
    forget: Uri | None = Field(
        None,
        description="URI of a list of users to forget (Parquet or CSV, column user_id): their rows are skipped, and "
        "their data in extend_from are not carried over.",
    )

    @field_validator("format", mode="before")
    @classmethod
    def _refuse_collm(cls, value: object) -> object:
        if value == "collm":
            raise ValueError(_CONVERT_COLLM)
        return value

    @field_validator("delimiter", "item_delimiter", "user_delimiter")
    @classmethod
    def _check_delimiter(cls, value: str | None) -> str | None:
        value = {"tab": "\t", "\\t": "\t"}.get(value or "", value)
        if value is not None and (len(value) not in (1, 2) or not value.isascii() or set(value) & set('"\r\n')):
            raise ValueError("give one or two ASCII characters other than quotes and line ends, or tab")
        return value

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, value: str | None) -> str | None:
        try:
            known = value is None or bool("x".encode(value))
        except (LookupError, ValueError, TypeError):
            known = False
        if not known:
            raise ValueError(f"'{value}' is not a text encoding that Python knows; for example utf-16, latin1, cp1252")
        return value

    @field_validator("time_format")
    @classmethod
    def _check_time_format(cls, value: str | None) -> str | None:
        if value is not None and "%" not in value:
            raise ValueError("needs directives of strptime, for example '%d.%m.%Y %H:%M'")
        if value is not None:
            import pandas as pd  # late: other settings need no pandas

            try:
                pd.to_datetime(["x"], format=value, errors="coerce", utc=True)
            except (ValueError, re.error) as error:
                raise ValueError(f"{error}; use directives of strptime, for example '%d.%m.%Y %H:%M'") from None
        return value

    @model_validator(mode="after")
    def _check_text_tables(self) -> DatasetConfig:
        if (self.names is not None) != (self.header is False):
            raise ValueError("header: false and names, the list of the columns, need each other")
        for_tables = ("delimiter", "header", "names", "new_events")
        for_items = ("item_delimiter", "item_names")
        allowed = {"table": (*for_tables, *for_items), "delta": for_items, "iceberg": for_items}.get(
            self.format if self.asset is None else "", ()
        )
        given = [name for name in (*for_tables, *for_items) if getattr(self, name) is not None and name not in allowed]
        if given:
            raise ValueError(f"{given[0]} is for format: table; the other formats are fixed")
        for name, kind in (("version", "delta"), ("snapshot_id", "iceberg")):
            if getattr(self, name) is not None and self.format != kind:
                raise ValueError(f"{name} is for format: {kind}, not for {self.format}")
        if self.columns.timestamp is None and (
            self.split.method in ("calendar", "amazon_book") or self.expect.max_age_hours is not None
        ):
            raise ValueError("columns.timestamp: null leaves no times for calendar splits and expect.max_age_hours")
        return self

    @model_validator(mode="after")
    def _check_users(self) -> DatasetConfig:
        if (self.users_path is None) != (self.user_text is None):
            raise ValueError(
                "users_path, a file of users, and user_text, a template over its columns such as '{age}, {city}', need "
                "each other"
            )
        given = {
            "columns.user": self.columns.user,
            "user_names": self.user_names,
            "user_delimiter": self.user_delimiter,
        }
        for name, value in given.items():
            if value is not None and self.users_path is None:
                raise ValueError(
                    f"{name} is for the file of users_path, which is not set; columns.user_id names the users of the "
                    "interactions"
                )
        return self

    @model_validator(mode="after")
    def _check(self) -> DatasetConfig:
        if (self.path is None) == (self.asset is None):
            raise ValueError("give exactly one of dataset.path and dataset.asset")
        reads_columns = self.format in ("table", "delta", "iceberg") and self.asset is None
        has_one_target = (self.columns.rating is None) != (self.columns.label is None)
        if reads_columns and self.feedback == "explicit" and not has_one_target:
            raise ValueError("feedback: explicit needs exactly one of columns.rating and columns.label")
        if reads_columns and self.split.method == "column" and self.columns.split is None:
            raise ValueError("split.method: column needs columns.split")
        return self
