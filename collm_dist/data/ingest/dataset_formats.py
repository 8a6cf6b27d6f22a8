"""Formats of published datasets: their files, columns and encodings."""

from __future__ import annotations

from dataclasses import dataclass, field

from collm_dist.config import ColumnsConfig, DatasetConfig
from collm_dist.data.ingest.file_readers import BadRows, FileFormat, read_tables
from collm_dist.errors import DataError
from collm_dist.storage import list_files, split_query


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


_REVIEWS_2018 = FileFormat("json", schema=(("reviewerID", "string"), ("asin", "string"), ("overall", "double"),
                                       ("unixReviewTime", "int64")))  # fmt: skip
_REVIEWS_2023 = FileFormat("json", schema=(("user_id", "string"), ("parent_asin", "string"), ("rating", "double"),
                                       ("timestamp", "int64")))  # fmt: skip


def find_dataset_layout(name: str, folder: str, dataset: DatasetConfig) -> DatasetLayout:
    """Return the layout of a dataset in one of the publishers' formats.

    Raises:
        DataError: the folder lacks a file that the format needs.
    """
    files = list_files(folder, "dataset.path")

    def find(*endings: str, required: bool = True) -> tuple[str, ...]:
        matches = tuple(file for file in files if split_query(file)[0].endswith(endings))
        if required and not matches:
            raise DataError(
                f"dataset.path: '{folder}' has no file that ends in {' or '.join(endings)} (format: {name})"
            )
        return matches

    def columns(user: str, item: str, timestamp: str, rating: str) -> ColumnsConfig:
        explicit = dataset.feedback == "explicit"
        return ColumnsConfig(user_id=user, item_id=item, timestamp=timestamp, rating=rating if explicit else None)

    plain = columns("user_id", "item_id", "timestamp", "rating")
    names = ("user_id", "item_id", "rating", "timestamp")
    if name == "movielens_100k":
        flags = tuple(f"genre_{number}" for number in range(19))
        items = FileFormat("text", "|", "latin1", ("item_id", "title", "release_date", "video_date", "url", *flags))
        return DatasetLayout(
            find("u.data")[:1],
            find("u.item")[:1],
            plain,
            file_format=FileFormat("text", "\t", names=names),
            items_format=items,
        )
    if name == "movielens_1m":
        items = FileFormat("text", "::", "latin1", ("item_id", "title", "genres"))
        return DatasetLayout(
            find("ratings.dat")[:1],
            find("movies.dat")[:1],
            plain,
            file_format=FileFormat("text", "::", "latin1", names),
            items_format=items,
        )
    if name == "movielens_32m":
        return DatasetLayout(
            find("ratings.csv")[:1],
            find("movies.csv")[:1],
            columns("userId", "movieId", "timestamp", "rating"),
            item_id="movieId",
        )
    if name == "recbole":
        atomic = FileFormat("text", "\t", typed_header=True)
        return DatasetLayout(
            find(".inter"),
            find(".item", required=False),
            plain,
            title=_find_recbole_title(files),
            file_format=atomic,
            items_format=atomic,
        )
    metadata = tuple(
        file for file in find(".jsonl", ".json", ".jsonl.gz", ".json.gz", required=False) if "meta_" in file
    )
    if name == "amazon_2018":
        tables = find(".csv", ".csv.gz", required=False)
        meta = FileFormat("json", schema=(("asin", "string"), ("title", "string")))
        if tables:
            file_format = FileFormat("text", ",", names=("item_id", "user_id", "rating", "timestamp"))
            return DatasetLayout(tables, metadata, plain, "asin", file_format=file_format, items_format=meta)
        reviews = tuple(file for file in find(".json", ".json.gz") if "meta_" not in file)
        return DatasetLayout(
            reviews,
            metadata,
            columns("reviewerID", "asin", "unixReviewTime", "overall"),
            "asin",
            file_format=_REVIEWS_2018,
            items_format=meta,
        )
    meta = FileFormat("json", schema=(("parent_asin", "string"), ("title", "string")))
    mapped = columns("user_id", "parent_asin", "timestamp", "rating")
    tables = find(".csv", ".csv.gz", required=False)
    if tables:
        return DatasetLayout(tables, metadata, mapped, "parent_asin", items_format=meta)
    reviews = tuple(file for file in find(".jsonl", ".jsonl.gz") if "meta_" not in file)
    return DatasetLayout(reviews, metadata, mapped, "parent_asin", file_format=_REVIEWS_2023, items_format=meta)


def _find_recbole_title(files: list[str]) -> str:
    """Return the first column with 'title' in its name, else the item's id; atomic files have no fixed title column."""
    for uri in files:
        if uri.endswith(".item"):
            for table in read_tables(uri, FileFormat("text", "\t", typed_header=True), BadRows()):
                return next((name for name in table.column_names if "title" in name), "item_id")
    return "item_id"
