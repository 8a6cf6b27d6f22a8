"""Manifest of the data step: contents and checksums of shards and tables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collm_dist.errors import ArtifactError
from collm_dist.runs.atomic_files import compute_json_hash
from collm_dist.runs.run_dir import check_record_hash

FORMAT_VERSION = 1
USER_TEXTS = "user_texts.parquet"
# Likes and events of each item, in exports without users.
ITEM_COUNTS = "item_counts.parquet"
# Fields covered by the content hash: everything that determines the input of later steps.
HASHED_FIELDS = (
    "format_version",
    "num_users",
    "num_items",
    "users_hash",
    "items_hash",
    "texts_hash",
    "user_texts_hash",
    "has_order",
    "ties",
    "feedback",
    "max_history_length",
    "splits",
    "shards",
    "buckets",
)


@dataclass(frozen=True)
class ShardInfo:
    """One shard. ``path`` is relative to the data folder; ``rows`` and ``contexts`` are counts."""

    path: str
    split: str
    rows: int
    contexts: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split. ``rows`` counts samples, ``real_rows`` the events among them; times are seconds since 1970."""

    rows: int
    contexts: int
    real_rows: int
    first_timestamp: int
    last_timestamp: int


@dataclass(frozen=True)
class BucketInfo:
    """One table of interactions. ``user_ranges`` are (first user, number of users) slices, one per extension."""

    path: str
    rows: int
    user_ranges: tuple[tuple[int, int], ...]
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``.

    Attributes:
        users_hash, items_hash: hashes of the raw ids in the order of their indices.
        tables: SHA-256 of users.parquet, items.parquet and, with user texts, user_texts.parquet.
        user_texts_hash: hash of the user texts; None without ``dataset.users_path``.
        has_order: whether the shards hold the order of a user's likes and dislikes.
        events_end: first second after all events, of an export without them, which also lacks users; None = all are
            there.
        extends: sizes and hashes of the id tables that these extend (tombstones aside); empty if none.
        content_hash: hash of ``HASHED_FIELDS``; identifies the data in the records of later steps.
    """

    num_users: int
    num_items: int
    users_hash: str
    items_hash: str
    ties: str
    feedback: str
    max_history_length: int
    splits: Mapping[str, SplitInfo]
    shards: tuple[ShardInfo, ...]
    buckets: tuple[BucketInfo, ...]
    dropped: Mapping[str, int]
    content_hash: str
    tables: Mapping[str, str] = field(default_factory=dict)
    extends: Mapping[str, Any] = field(default_factory=dict)
    user_texts_hash: str | None = None
    has_order: bool = False
    events_end: int | None = None

    @property
    def has_events(self) -> bool:
        """Whether the tables of users and events are there."""
        return self.events_end is None

    def list_shards(self, split: str) -> tuple[ShardInfo, ...]:
        """Return a split's shards in order."""
        return tuple(shard for shard in self.shards if shard.split == split)


def load_manifest(data_dir: Path) -> Manifest:
    """Load the manifest of a data folder.

    Raises:
        ArtifactError: the manifest is missing, damaged, or of another format version.
    """
    path = data_dir / "manifest.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_record_hash(record)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: run launch/preprocess_data.py first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): redo the data step with --force data") from None
    if not isinstance(record, dict):
        raise ArtifactError(f"{path} is not a manifest: redo the data step with --force data")
    if record.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(f"{path} has format version {record.get('format_version')}, this release reads "
                            f"{FORMAT_VERSION}: redo the data step with --force data")  # fmt: skip
    try:
        if record.get("content_hash") != compute_content_hash(record):
            raise ArtifactError(
                f"{path} is damaged or was edited: its content hash differs; restore it from the copy that it came "
                "from, or redo the data step with --force data"
            )
        return _build_manifest(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is not a manifest of a data step ({error}): redo it with --force data") from None


def remove_unlisted_files(data_dir: Path, record: Mapping[str, Any]) -> None:
    """Remove shards and tables that a manifest's record does not list, left by other settings or killed tasks."""
    listed = {data_dir / info["path"] for info in [*record["shards"], *record["buckets"]]}
    if USER_TEXTS not in record["tables"]:
        (data_dir / USER_TEXTS).unlink(missing_ok=True)
    for folder in ("interactions", "shards"):
        for path in (data_dir / folder).iterdir():
            if path not in listed:
                path.unlink()


def compute_content_hash(record: Mapping[str, Any]) -> str:
    """Return the hash of the fields of a manifest's record that describe the data."""
    return compute_json_hash({name: record[name] for name in HASHED_FIELDS if name in record})


def _build_manifest(record: Mapping[str, Any]) -> Manifest:
    for info in (*record["shards"], *record["buckets"]):
        if not re.fullmatch(r"(shards|interactions)/[\w-][\w.-]*", info["path"]):
            raise ValueError(f"{info['path']!r} is not a file of a data folder")
    return Manifest(
        splits={name: SplitInfo(**info) for name, info in record["splits"].items()},
        shards=tuple(ShardInfo(**info) for info in record["shards"]),
        buckets=tuple(
            BucketInfo(**{**info, "user_ranges": tuple((first, count) for first, count in info["user_ranges"])})
            for info in record["buckets"]
        ),
        tables=record.get("tables", {}),
        extends=record.get("extends") or {},
        user_texts_hash=record.get("user_texts_hash"),
        has_order=bool(record.get("has_order")),
        events_end=None if record.get("events_end") is None else int(record["events_end"]),
        **{name: record[name] for name in _PLAIN_FIELDS},
    )


_PLAIN_FIELDS = (
    "num_users",
    "num_items",
    "users_hash",
    "items_hash",
    "ties",
    "feedback",
    "max_history_length",
    "dropped",
    "content_hash",
)
