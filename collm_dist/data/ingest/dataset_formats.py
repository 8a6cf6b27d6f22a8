"""Formats of published datasets: their files, columns and encodings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from collm_dist.config import ColumnsConfig, DatasetConfig
from collm_dist.config.dataset_section import ItemColumnsConfig
from collm_dist.data.ingest.column_checks import explain_missing_column
from collm_dist.data.ingest.file_format import LINE_COLUMN, UTF8_OR_LATIN1
from collm_dist.data.ingest.file_readers import BadRows, FileFormat, read_tables
from collm_dist.data.ingest.item_texts import list_template_columns
from collm_dist.data.ingest.lake_tables import open_lake_table
from collm_dist.data.ingest.row_filter import parse_row_filter
from collm_dist.errors import DataError
from collm_dist.storage import list_files, split_query

# Formats whose columns the settings name; the others have columns of their own.
TABLE_FORMATS = ("table", "delta", "iceberg")


@dataclass(frozen=True)
class DatasetLayout:
    """Files of a dataset with their formats and columns."""

    interactions: tuple[str, ...]
    items: tuple[str, ...]
    columns: ColumnsConfig
    item_id: str = "item_id"
    title: str = "title"
    file_format: FileFormat = field(default_factory=FileFormat)
    items_format: FileFormat = field(default_factory=FileFormat)


_RECBOLE = FileFormat("text", "\t", typed_header=True)
_REVIEWS_2018 = FileFormat("json", schema=(("reviewerID", "string"), ("asin", "string"), ("overall", "double"),
                                       ("unixReviewTime", "int64")))  # fmt: skip
_REVIEWS_2023 = FileFormat("json", schema=(("user_id", "string"), ("parent_asin", "string"), ("rating", "double"),
                                       ("timestamp", "int64")))  # fmt: skip


def find_dataset_layout(name: str, folder: str, dataset: DatasetConfig) -> DatasetLayout:
    """Return the files of a dataset in a published format.

    Args:
        name: the format, a value of ``dataset.format`` other than table.
        folder: URI of the folder with the files.
        dataset: the settings.

    Raises:
        DataError: the folder lacks a file that the format needs.
    """
    files = _DatasetFolder(name, folder, dataset.feedback == "explicit")
    layout = _FINDERS[name.partition("_")[0]](files)
    layout = replace(
        layout,
        file_format=_read_more(layout.file_format, _list_wanted(dataset)),
        items_format=_read_more(layout.items_format, _list_wanted_of_items(dataset)),
    )
    return _adopt_columns(layout, dataset)


def find_table_layout(dataset: DatasetConfig, path: str, parts: Sequence[str] = ()) -> DatasetLayout:
    """Return the files of a log in the columns that the settings name, or the data files of a lakehouse table.

    Args:
        dataset: the settings.
        path: location of the interactions.
        parts: files of ``dataset.new_events``.

    Raises:
        ConfigError: a library is not installed.
        DataError: a file or table is missing.
        LaunchError: an object store is unreachable or denies access.
    """
    log, catalogue = open_lake_table(dataset, "dataset.path"), open_lake_table(dataset, "dataset.items_path")
    items = list_files(dataset.items_path, "dataset.items_path") if dataset.items_path and catalogue is None else ()
    return DatasetLayout(
        interactions=tuple(log.files) if log is not None else (*list_files(path, "dataset.path"), *parts),
        items=tuple(items if catalogue is None else catalogue.files),
        columns=_select_columns(dataset),
        item_id=dataset.item_columns.item_id,
        title=dataset.item_columns.title,
        file_format=FileFormat(
            delimiter=dataset.delimiter, names=dataset.names or (), delimiter_key="dataset.delimiter", table=log
        ),
        items_format=FileFormat(
            delimiter=dataset.item_delimiter or dataset.delimiter,
            names=dataset.item_names or (),
            delimiter_key="dataset.item_delimiter" if dataset.item_delimiter is not None else None,
            table=catalogue,
        ),
    )


def _select_columns(dataset: DatasetConfig) -> ColumnsConfig:
    """Return the configured columns without those that the feedback type and split method ignore."""
    columns = dataset.columns.model_copy(update={"user": None})  # of another file
    if dataset.feedback == "implicit":
        columns = columns.model_copy(update={"rating": None, "label": None})
    if dataset.split.method != "column":
        columns = columns.model_copy(update={"split": None})
    return columns


def _list_wanted(dataset: DatasetConfig) -> set[str]:
    """Return the columns of interactions that the settings name."""
    names = parse_row_filter(dataset.row_filter).names if dataset.row_filter else ()
    usual = ColumnsConfig().model_dump()
    return set(names) | {
        name
        for key, name in dataset.columns.model_dump(exclude={"user"}).items()
        if name is not None and name != usual[key]
    }


def _list_wanted_of_items(dataset: DatasetConfig) -> set[str]:
    """Return the columns of items that the settings name."""
    columns, usual = dataset.item_columns.model_dump(), ItemColumnsConfig().model_dump()
    named = {name for key, name in columns.items() if name != usual[key]}
    return named | set(list_template_columns(dataset.item_text)) - {"title"}


def _read_more(file_format: FileFormat, names: set[str]) -> FileFormat:
    return replace(file_format, has_more_columns=bool(names - set(dict(file_format.schema))))


def _adopt_columns(layout: DatasetLayout, dataset: DatasetConfig) -> DatasetLayout:
    """Return a layout with the columns that the settings name.

    A setting that only repeats its own name (``rating: rating``, as in shipped configurations) does not stop a format
    in which the column has another name.

    Raises:
        DataError: the files lack a column with another name.
    """
    wanted, columns = _list_wanted(dataset), layout.columns
    if "timestamp" in dataset.columns.model_fields_set and dataset.columns.timestamp is None:
        columns = columns.model_copy(update={"timestamp": None})
    if wanted:
        uri, available = _peek(layout.interactions, layout.file_format)
        for key, name in dataset.columns.model_dump(exclude={"user"}).items():
            is_target = key in ("rating", "label")
            if name not in wanted or (is_target and dataset.feedback == "implicit"):
                continue
            if key == "split" and dataset.split.method != "column":
                continue
            if name not in available:
                if name != key and available:
                    raise explain_missing_column(uri, name, available, f"dataset.columns.{key}")
                continue
            targets = {"rating": None, "label": None} if is_target else {}
            columns = columns.model_copy(update=targets | {key: name})
    names = {"item_id": layout.item_id, "title": layout.title}
    if layout.items and _list_wanted_of_items(dataset):
        usual = ItemColumnsConfig().model_dump()
        uri, available = _peek(layout.items, layout.items_format)
        for key, name in dataset.item_columns.model_dump().items():
            if name == usual[key] or not available:
                continue
            if name not in available:
                raise explain_missing_column(uri, name, available, f"dataset.item_columns.{key}")
            names[key] = name
    return replace(layout, columns=columns, item_id=names["item_id"], title=names["title"])


def _peek(uris: tuple[str, ...], file_format: FileFormat) -> tuple[str, list[str]]:
    """Return the first file that has rows and its columns; no columns if no file has rows."""
    for uri in uris:
        for table in read_tables(uri, file_format, BadRows()):
            return uri, [str(name) for name in table.column_names if name != LINE_COLUMN]
    return uris[0] if uris else "", []


class _DatasetFolder:
    """The files of a folder, found by the ends of their names."""

    def __init__(self, format_name: str, uri: str, has_ratings: bool) -> None:
        self.format_name = format_name
        self._uri, self._has_ratings = uri, has_ratings
        self._files = list_files(uri, "dataset.path")

    def find(self, *endings: str, required: bool = True) -> tuple[str, ...]:
        matches = tuple(file for file in self._files if split_query(file)[0].endswith(endings))
        if required and not matches:
            raise DataError(
                f"dataset.path: '{self._uri}' has no file that ends in {' or '.join(endings)} "
                f"(format: {self.format_name})"
            )
        return matches

    def name_columns(self, user: str, item: str, timestamp: str, rating: str) -> ColumnsConfig:
        rating_column = rating if self._has_ratings else None
        return ColumnsConfig(user_id=user, item_id=item, timestamp=timestamp, rating=rating_column)


# In the order of the arguments of ``name_columns``.
_PLAIN_NAMES = ("user_id", "item_id", "timestamp", "rating")


def _find_movielens(folder: _DatasetFolder) -> DatasetLayout:
    columns, file_columns = folder.name_columns(*_PLAIN_NAMES), ("user_id", "item_id", "rating", "timestamp")
    if folder.format_name == "movielens_100k":
        genres = tuple(f"genre_{number}" for number in range(19))
        item_names = ("item_id", "title", "release_date", "video_date", "url", *genres)
        return DatasetLayout(
            folder.find("u.data")[:1],
            folder.find("u.item")[:1],
            columns,
            file_format=FileFormat("text", "\t", names=file_columns),
            items_format=FileFormat("text", "|", UTF8_OR_LATIN1, item_names),
        )
    if folder.format_name == "movielens_1m":
        return DatasetLayout(
            folder.find("ratings.dat")[:1],
            folder.find("movies.dat")[:1],
            columns,
            file_format=FileFormat("text", "::", UTF8_OR_LATIN1, file_columns),
            items_format=FileFormat("text", "::", UTF8_OR_LATIN1, ("item_id", "title", "genres")),
        )
    columns = folder.name_columns("userId", "movieId", "timestamp", "rating")
    return DatasetLayout(folder.find("ratings.csv")[:1], folder.find("movies.csv")[:1], columns, item_id="movieId")


def _find_recbole(folder: _DatasetFolder) -> DatasetLayout:
    items = folder.find(".item", required=False)
    return DatasetLayout(
        folder.find(".inter"),
        items,
        folder.name_columns(*_PLAIN_NAMES),
        title=_find_recbole_title(items),
        file_format=_RECBOLE,
        items_format=_RECBOLE,
    )


def _find_recbole_title(item_files: tuple[str, ...]) -> str:
    """Return the first column with 'title' in its name, else the item's id; atomic files have no fixed title column."""
    return next((name for name in _peek(item_files, _RECBOLE)[1] if "title" in name), "item_id")


def _find_amazon(folder: _DatasetFolder) -> DatasetLayout:
    json_files = folder.find(".jsonl", ".json", ".jsonl.gz", ".json.gz", required=False)
    metadata = tuple(file for file in json_files if "meta_" in file)
    tables = folder.find(".csv", ".csv.gz", required=False)

    def find_reviews(*endings: str) -> tuple[str, ...]:
        return tuple(file for file in folder.find(*endings) if "meta_" not in file)

    if folder.format_name == "amazon_2018":
        items_format = FileFormat("json", schema=(("asin", "string"), ("title", "string")))
        if tables:
            columns = folder.name_columns(*_PLAIN_NAMES)
            file_format = FileFormat("text", ",", names=("item_id", "user_id", "rating", "timestamp"))
            return DatasetLayout(tables, metadata, columns, "asin", file_format=file_format, items_format=items_format)
        columns = folder.name_columns("reviewerID", "asin", "unixReviewTime", "overall")
        reviews = find_reviews(".json", ".json.gz")
        return DatasetLayout(reviews, metadata, columns, "asin", file_format=_REVIEWS_2018, items_format=items_format)
    columns = folder.name_columns("user_id", "parent_asin", "timestamp", "rating")
    items_format = FileFormat("json", schema=(("parent_asin", "string"), ("title", "string")))
    if tables:
        return DatasetLayout(tables, metadata, columns, "parent_asin", items_format=items_format)
    reviews = find_reviews(".jsonl", ".jsonl.gz")
    return DatasetLayout(
        reviews, metadata, columns, "parent_asin", file_format=_REVIEWS_2023, items_format=items_format
    )


# By the first word of ``dataset.format``.
_FINDERS = {"movielens": _find_movielens, "recbole": _find_recbole, "amazon": _find_amazon}
