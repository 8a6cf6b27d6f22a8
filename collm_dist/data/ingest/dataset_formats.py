"""The publishers' own layouts: which file is what, and what its columns are called."""

from __future__ import annotations

from dataclasses import dataclass, field

from collm_dist.config import ColumnsConfig, DatasetConfig
from collm_dist.data.ingest.file_readers import FileFormat
from collm_dist.errors import DataError
from collm_dist.storage import list_files, split_query


@dataclass(frozen=True)
class DatasetLayout:
    """Files of a dataset and how they are read."""

    interactions: tuple[str, ...]
    items: tuple[str, ...]
    columns: ColumnsConfig
    item_id: str = "item_id"
    title: str = "title"
    layout: FileFormat = field(default_factory=FileFormat)
    items_layout: FileFormat = field(default_factory=FileFormat)


_REVIEWS_2018 = FileFormat("json", schema=(("reviewerID", "string"), ("asin", "string"), ("overall", "double"),
                                       ("unixReviewTime", "int64")))  # fmt: skip
_REVIEWS_2023 = FileFormat("json", schema=(("user_id", "string"), ("parent_asin", "string"), ("rating", "double"),
                                       ("timestamp", "int64")))  # fmt: skip


def find_dataset_layout(name: str, folder: str, dataset: DatasetConfig) -> DatasetLayout:
    """Return the layout of a dataset in one of the publishers' formats.

    Raises:
        DataError: a file that the format needs is not in the folder.
    """
    files = list_files(folder, "dataset.path")

    def find(*endings: str, required: bool = True) -> tuple[str, ...]:
        found = tuple(one for one in files if split_query(one)[0].endswith(endings))
        if required and not found:
            raise DataError(f"dataset.path: '{folder}' has no file that ends in {' or '.join(endings)} ({name})")
        return found

    def columns(user: str, item: str, timestamp: str, rating: str) -> ColumnsConfig:
        explicit = dataset.feedback == "explicit"
        return ColumnsConfig(user_id=user, item_id=item, timestamp=timestamp, rating=rating if explicit else None)

    plain = columns("user_id", "item_id", "timestamp", "rating")
    names = ("user_id", "item_id", "rating", "timestamp")
    if name == "movielens_100k":
        flags = tuple(f"genre_{number}" for number in range(19))
        items = FileFormat("text", "|", "latin1", ("item_id", "title", "release_date", "video_date", "url", *flags))
        return DatasetLayout(find("u.data")[:1], find("u.item")[:1], plain,
                           layout=FileFormat("text", "\t", names=names), items_layout=items)  # fmt: skip
    if name == "movielens_1m":
        items = FileFormat("text", "::", "latin1", ("item_id", "title", "genres"))
        return DatasetLayout(find("ratings.dat")[:1], find("movies.dat")[:1], plain,
                           layout=FileFormat("text", "::", "latin1", names), items_layout=items)  # fmt: skip
    if name == "movielens_32m":
        return DatasetLayout(find("ratings.csv")[:1], find("movies.csv")[:1],
                           columns("userId", "movieId", "timestamp", "rating"), item_id="movieId")  # fmt: skip
    if name == "recbole":
        atomic = FileFormat("text", "\t", typed_header=True)
        return DatasetLayout(find(".inter"), find(".item", required=False), plain, title=_recbole_title(folder, files),
                           layout=atomic, items_layout=atomic)  # fmt: skip
    metadata = tuple(one for one in find(".jsonl", ".json", ".jsonl.gz", ".json.gz", required=False) if "meta_" in one)
    if name == "amazon_2018":
        tables = find(".csv", ".csv.gz", required=False)
        meta = FileFormat("json", schema=(("asin", "string"), ("title", "string")))
        if tables:
            layout = FileFormat("text", ",", names=("item_id", "user_id", "rating", "timestamp"))
            return DatasetLayout(tables, metadata, plain, "asin", layout=layout, items_layout=meta)
        reviews = tuple(one for one in find(".json", ".json.gz") if "meta_" not in one)
        return DatasetLayout(reviews, metadata, columns("reviewerID", "asin", "unixReviewTime", "overall"), "asin",
                           layout=_REVIEWS_2018, items_layout=meta)  # fmt: skip
    meta = FileFormat("json", schema=(("parent_asin", "string"), ("title", "string")))
    mapped = columns("user_id", "parent_asin", "timestamp", "rating")
    tables = find(".csv", ".csv.gz", required=False)
    if tables:
        return DatasetLayout(tables, metadata, mapped, "parent_asin", items_layout=meta)
    reviews = tuple(one for one in find(".jsonl", ".jsonl.gz") if "meta_" not in one)
    return DatasetLayout(reviews, metadata, mapped, "parent_asin", layout=_REVIEWS_2023, items_layout=meta)


def _recbole_title(folder: str, files: list[str]) -> str:
    """Atomic files name the title column as they like: the first whose name holds 'title', else the item's id."""
    from collm_dist.data.ingest.file_readers import BadRows, read_tables

    for uri in files:
        if uri.endswith(".item"):
            for table in read_tables(uri, FileFormat("text", "\t", typed_header=True), BadRows()):
                return next((name for name in table.column_names if "title" in name), "item_id")
    return "item_id"
