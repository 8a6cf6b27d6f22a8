"""The record that becomes ``manifest.json``, built from the statistics of the preprocessing tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from collm_dist.config import DatasetConfig
from collm_dist.data.ingest.forgotten_users import find_tombstones
from collm_dist.data.ingest.id_tables import IdTables, PreviousTables, compute_ids_hash, describe_previous
from collm_dist.data.ingest.input_facts import format_dropped, format_facts
from collm_dist.data.ingest.item_texts import ItemCatalogue
from collm_dist.data.ingest.normalize import format_time
from collm_dist.data.ingest.source import Source
from collm_dist.data.ingest.user_texts import format_user_texts
from collm_dist.data.preprocess_plan import PreprocessPlan
from collm_dist.data.samples.splits import SPLITS
from collm_dist.data.shards.manifest import FORMAT_VERSION, USER_TEXTS, compute_content_hash
from collm_dist.runs.atomic_files import compute_file_hash

TaskStats = list[dict[str, Any]]


@dataclass(frozen=True)
class PreprocessStats:
    """Statistics that the preprocessing tasks returned, one dictionary per task.

    Attributes:
        reads, filters, joins, shards: of ``read_chunk``, ``filter_bucket``, ``join_bucket``, ``write_split_shard``.
        split_rows: rows of each split, see ``sum_split_rows``.
        items: the item files.
        num_forgotten: number of users on the list ``dataset.forget``.
        facts: see ``input_facts.describe_input``.
        user_texts: see ``user_texts.write_user_texts``.
    """

    reads: TaskStats
    filters: TaskStats
    joins: TaskStats
    shards: TaskStats
    split_rows: dict[str, Counter[str]]
    items: ItemCatalogue
    num_forgotten: int
    facts: dict[str, Any]
    user_texts: dict[str, Any]


def sum_split_rows(sample_stats: TaskStats) -> dict[str, Counter[str]]:
    """Return ``rows`` and ``real_rows`` of each split, summed over the buckets."""
    split_rows = {name: Counter[str]() for name in SPLITS}
    for stats in sample_stats:
        for name, rows in stats["splits"].items():
            split_rows[name].update(rows)
    return split_rows


def build_manifest_record(
    plan: PreprocessPlan, source: Source, previous: PreviousTables, tables: IdTables, stats: PreprocessStats
) -> dict[str, Any]:
    """Return the manifest's record without its fingerprint, with examples of rows for ``format_summary``.

    Args:
        plan: settings and folders.
        source: the raw log.
        previous: id tables of the run that this one extends.
        tables: id tables of this run.
        stats: statistics of the tasks.
    """
    shards = [shard for shard in stats.shards if shard]
    tables_read = {key: {"location": table.location} | table.describe() for key, table in source.tables.items()}
    hashed = {
        "format_version": FORMAT_VERSION,
        "num_users": len(tables.user_ids),
        "num_items": len(tables.item_ids),
        "users_hash": compute_ids_hash(tables.user_ids),
        "items_hash": compute_ids_hash(tables.item_ids),
        "texts_hash": tables.texts_hash,
        **({"user_texts_hash": stats.user_texts["hash"]} if stats.user_texts else {}),
        **({"has_order": True} if plan.stores_order else {}),
        "ties": plan.preprocessing.ties,
        "feedback": plan.dataset.feedback,
        "max_history_length": plan.preprocessing.max_history_length,
        "splits": {name: _describe_split(name, stats.split_rows[name], shards) for name in SPLITS},
        "shards": [shard["info"] for shard in shards],
        "buckets": _describe_buckets(stats.joins, tables.user_ranges),
    }
    return hashed | {
        "content_hash": compute_content_hash(hashed),
        "extends": describe_previous(plan.dataset.extend_from).get("dataset.extend_from"),
        "dropped": _count_dropped_rows(stats),
        **_describe_forgotten(plan, source, stats, previous),
        "items_without_text": tables.num_items_without_text,
        "items_mended": dict(sorted(stats.items.repairs.items())),
        **({"user_texts": stats.user_texts} if stats.user_texts else {}),
        "tables": {
            name: compute_file_hash(plan.data_dir / name)
            for name in ("users.parquet", "items.parquet", *([USER_TEXTS] if stats.user_texts else []))
        },
        "input": {
            "rows": sum(read["rows_read"] for read in stats.reads),
            "bad_examples": [example for read in stats.reads for example in read["examples"]][:5],
            "dropped_examples": _find_examples(stats),
            "facts": stats.facts,
            **({"tables": tables_read} if tables_read else {}),
        },
    }


def drop_examples(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without examples of rows, as it is written: a user's id stands only in the tables of users."""
    facts = {key: value for key, value in record["input"]["facts"].items() if key != "sample_rows"}
    kept = {key: value for key, value in record["input"].items() if key != "dropped_examples"}
    kept["bad_examples"] = [_drop_value(example, record["dropped"]) for example in kept["bad_examples"]]
    texts = {key: value for key, value in record.get("user_texts", {}).items() if key != "examples"}
    return record | {"input": kept | {"facts": facts}} | ({"user_texts": texts} if texts else {})


def _drop_value(example: str, causes: Iterable[str]) -> str:
    """Return ``file:line: cause`` of an example of ``BadRows``, without the cell's value, which may be a user's id."""
    for cause in sorted(causes, key=len, reverse=True):
        place, mark, _ = example.partition(f": {cause}")
        if mark:
            return place + mark
    return example.partition(" (")[0]


def _describe_split(name: str, rows: Counter[str], shards: TaskStats) -> dict[str, Any]:
    split_shards = [shard for shard in shards if shard["info"]["split"] == name]
    return {
        **rows,
        "contexts": sum(shard["info"]["contexts"] for shard in split_shards),
        "first_timestamp": min(shard["first"] for shard in split_shards),
        "last_timestamp": max(shard["last"] for shard in split_shards),
    }


def _describe_buckets(joins: TaskStats, user_ranges: Sequence[list[tuple[int, int]]]) -> list[dict[str, Any]]:
    return [
        {
            "path": f"interactions/bucket-{bucket:05d}.parquet",
            "rows": join["rows"],
            "sha256": join["sha256"],
            "user_ranges": [list(user_range) for user_range in ranges],
        }
        for bucket, (join, ranges) in enumerate(zip(joins, user_ranges, strict=True))
    ]


def _count_dropped_rows(stats: PreprocessStats) -> dict[str, int]:
    dropped = Counter[str](
        {
            "outside the split windows": sum(read["outside"] for read in stats.reads),
            "forgotten users": sum(read["forgotten"] for read in stats.reads),
        }
    )
    for causes in [read[key] for read in stats.reads for key in ("bad", "notes") if key in read] + [
        bucket["dropped"] for bucket in stats.filters
    ]:
        dropped.update(causes)
    return {cause: count for cause, count in sorted(dropped.items()) if count}


def _find_examples(stats: PreprocessStats) -> dict[str, str]:
    """Return the first example of each cause of dropped rows, where there is one."""
    examples: dict[str, str] = {}
    for found in [read.get("first_bad", {}) for read in stats.reads] + [
        bucket.get("examples", {}) for bucket in stats.filters
    ]:
        examples = {**found, **examples}
    examples |= {f"item rows: {cause}": example for cause, example in stats.items.bad_rows.first.items()}
    return dict(sorted(examples.items()))


def _describe_forgotten(
    plan: PreprocessPlan, source: Source, stats: PreprocessStats, previous: PreviousTables
) -> dict[str, Any]:
    """Return the effect of ``dataset.forget`` as counts, without any id."""
    if plan.dataset.forget is None:
        return {}
    rows = Counter[str]()
    for read in stats.reads:
        rows[read["uri"]] += read["forgotten"]
    forgotten = {
        "users_asked": stats.num_forgotten,
        "users_in_log": len({user for read in stats.reads for user in read["forgotten_users"]}),
        "rows_passed_over": {uri: count for uri, count in rows.items() if count},
        "users_in_extended_run": previous.num_forgotten,
        "tombstones": len(find_tombstones(plan.data_dir)),
    }
    return {"forgotten": forgotten}


def format_summary(manifest: dict[str, Any], dataset: DatasetConfig) -> list[str]:
    """Return the lines that summarize a manifest on the terminal.

    Args:
        manifest: its record, with examples.
        dataset: the settings.
    """
    lines = [f"data: {manifest['num_users']:,} users, {manifest['num_items']:,} items"]
    for name, split in manifest["splits"].items():
        lines.append(f"  {name:5} {split['rows']:>12,} rows  {split['contexts']:>12,} contexts")
    facts = manifest["input"]["facts"]
    lines.append(f"  the input's {facts['rows']:,} usable rows:")
    lines += [f"  {line}" for line in format_facts(facts, dataset)]
    times = [split[key] for split in manifest["splits"].values() for key in ("first_timestamp", "last_timestamp")]
    kept = [format_time(limit(times)) for limit in (min, max)]
    if facts["first_time"] is not None and kept != [facts["first_time"], facts["last_time"]]:
        lines.append(f"  times of the rows that are kept: {kept[0]} to {kept[1]} (UTC)")
    lines += [f"  {line}" for line in format_dropped(manifest["dropped"], manifest["input"]["dropped_examples"])]
    examples = manifest["input"]["dropped_examples"]
    for cause, count in manifest.get("items_mended", {}).items():
        shown = examples.get(cause, examples.get(f"item rows: {cause}"))
        lines.append(f"  items: {count:,} x {cause}" + (f" (for example {shown})" if shown else ""))
    if users := manifest.get("user_texts"):
        lines += [f"  {line}" for line in format_user_texts(users)]
    if forgotten := manifest.get("forgotten"):
        lines.append(
            f"  to be forgotten: {forgotten['users_asked']:,} users, {forgotten['users_in_log']:,} of them in the log, "
            f"{forgotten['users_in_extended_run']:,} in the run that is extended"
        )
    return lines
