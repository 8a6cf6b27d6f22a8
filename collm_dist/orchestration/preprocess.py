"""Preprocessing on Ray: raw logs to samples, shards and a manifest. Workers never change the result."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from collm_dist.artifacts import RunDir, compute_fingerprint, compute_json_hash, is_step_current, write_json
from collm_dist.config import Config
from collm_dist.data import preprocess_tasks as tasks
from collm_dist.data.hashing import hash_integers
from collm_dist.data.id_tables import (
    PreviousTables,
    assign_users,
    compute_ids_hash,
    load_previous_tables,
    sort_naturally,
    write_item_table,
    write_user_table,
)
from collm_dist.data.manifest import FORMAT_VERSION
from collm_dist.data.negatives import EventPool
from collm_dist.data.partition import read_table
from collm_dist.data.readers import Source, open_source
from collm_dist.data.splits import (
    SPLITS,
    SplitRule,
    build_amazon_book_rule,
    build_calendar_rule,
    build_ratio_rule,
    get_amazon_book_window,
)
from collm_dist.errors import DataError
from collm_dist.orchestration.cluster import check_shared_folder, connect_ray, run_tasks

Runner = Callable[[str, Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]


def compute_data_fingerprint(config: Config, run_dir: RunDir, source: Source) -> dict[str, Any]:
    """Return what the data step depends on: its settings and the input files with size and time."""
    return compute_fingerprint(config, "data", run_dir, source.inputs())


def run_preprocess(config: Config, run_dir: RunDir, force: bool = False) -> dict[str, Any]:
    """Run the data step, unless it is done, and return its manifest.

    Args:
        config: the experiment.
        run_dir: where to write.
        force: redo it even if it is done.

    Raises:
        DataError: the input is missing or not what it should be.
        ArtifactError: the step was done with other settings or inputs.
    """
    source = open_source(config.dataset)
    fingerprint = compute_data_fingerprint(config, run_dir, source)
    data_dir = run_dir.step_dir("data")
    if not force and is_step_current(run_dir, "data", fingerprint):
        print(f"data: done already ({data_dir})")
        return run_dir.read_record("data")
    previous = load_previous_tables(config.dataset.extend_from, config.preprocessing.num_user_buckets)
    run_dir.record_path("data").unlink(missing_ok=True)
    work = data_dir / f".work-{compute_json_hash(fingerprint)[:12]}"
    for stale in data_dir.glob(".work-*"):
        if stale != work:
            shutil.rmtree(stale)
    work.mkdir(parents=True, exist_ok=True)
    plan = tasks.Plan(
        work=work.absolute(),
        data_dir=data_dir.absolute(),
        dataset=config.dataset,
        preprocessing=config.preprocessing,
        seed=config.run.seed,
        num_candidates=config.evaluation.num_candidates,
    )
    with connect_ray(config.cluster):
        check_shared_folder(plan.data_dir)

        def run(description: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
            return run_tasks(
                function,
                arguments,
                description=description,
                parallelism=config.cluster.preprocess_parallelism,
                progress_bar=config.monitoring.progress_bar,
            )

        manifest = _preprocess(plan, source, previous, run)
    manifest["fingerprint"] = fingerprint
    write_json(run_dir.record_path("data"), manifest)
    shutil.rmtree(work)
    _print_summary(manifest, data_dir)
    return manifest


def _preprocess(plan: tasks.Plan, source: Source, previous: PreviousTables, run: Runner) -> dict[str, Any]:
    plan_ref, source_ref = ray.put(plan), ray.put(source)
    chunks = list(enumerate(source.chunks))
    reads = run("reading", tasks.read_chunk, [(plan_ref, source_ref, index, chunk) for index, chunk in chunks])
    items = source.read_items()
    _check_reads(plan, reads, previous)

    bases = np.cumsum([0] + [read["rows_read"] for read in reads])
    window = None
    if plan.dataset.split.method == "calendar":
        window = build_calendar_rule(plan.dataset.split, min(read["first"] for read in reads))
    paths = [plan.work / f"chunk-{index:05d}.arrow" for index, _ in chunks]
    known = ray.put(_select_items(plan, items, len(chunks)))
    buckets = range(plan.num_buckets)
    filtered = run(
        "filtering",
        tasks.filter_bucket,
        [(plan_ref, bucket, paths, bases[:-1].tolist(), known, window) for bucket in buckets],
    )
    if sum(one["rows"] for one in filtered) == 0:
        raise DataError("dataset: no interaction is left after filters and split windows; loosen dataset.min_*, "
                        "dataset.max_* or dataset.split")  # fmt: skip
    rule = window or _build_rule(plan)

    user_tables, user_ranges = assign_users(
        previous,
        [read_table(plan.work / f"filtered-{b:05d}.users.arrow").column("id").combine_chunks() for b in buckets],
    )
    found = {
        one for b in buckets for one in read_table(plan.work / f"filtered-{b:05d}.items.arrow").column("id").to_pylist()
    }
    item_ids = [*previous.item_ids, *sort_naturally(list(found.difference(previous.item_ids)))]
    items_ref = ray.put(pa.array(item_ids, pa.string()))
    pool = ray.put(_draw_pool(plan, item_ids))
    built = run(
        "building samples",
        tasks.build_bucket,
        [(plan_ref, b, rule, user_tables[b], items_ref, pool, int(bases[-1])) for b in buckets],
    )
    split_rows = {name: Counter[str]() for name in SPLITS}
    for one in built:
        for name, counts in one["splits"].items():
            split_rows[name].update(counts)
    _check_splits(plan, split_rows)
    run("counting item events", tasks.count_items, [(plan_ref, part) for part in buckets])
    joined = run("joining", tasks.join_bucket, [(plan_ref, bucket) for bucket in buckets])
    shards = run(
        "packing shards",
        tasks.write_split_shard,
        [(plan_ref, split, shard) for split in range(len(SPLITS)) for shard in range(plan.preprocessing.num_shards)],
    )

    user_ids = write_user_table(plan.data_dir / "users.parquet", user_tables)
    without_text = write_item_table(plan.data_dir / "items.parquet", item_ids, items)
    dropped = Counter[str]({"outside the split windows": sum(read["outside"] for read in reads)})
    for one in [{"dropped": read["bad"]} for read in reads] + filtered:
        dropped.update(one["dropped"])
    return _describe(plan, user_ids, item_ids, split_rows, shards, joined, user_ranges) | {
        "dropped": {cause: count for cause, count in sorted(dropped.items()) if count},
        "items_without_text": without_text,
        "input": {"rows": int(bases[-1]), "bad_examples": [line for read in reads for line in read["examples"]][:5]},
    }


def _check_reads(plan: tasks.Plan, reads: list[dict[str, Any]], previous: PreviousTables) -> None:
    """Refuse data that is not what was promised, before anything is made of it."""
    total = sum(read["rows_read"] for read in reads)
    bad = sum((Counter[str](read["bad"]) for read in reads), Counter[str]())
    if total == 0:
        raise DataError("dataset.path: the input has no rows")
    if sum(bad.values()) > plan.dataset.max_bad_row_share * total:
        causes = ", ".join(f"{count} x {cause}" for cause, count in bad.most_common())
        examples = "\n  ".join(line for read in reads for line in read["examples"])
        raise DataError(
            f"dataset: {sum(bad.values())} of {total} rows cannot be used ({causes}), more than "
            f"dataset.max_bad_row_share={plan.dataset.max_bad_row_share}. The first ones:\n  {examples}"
        )
    expect = plan.dataset.expect
    if total < expect.min_rows:
        raise DataError(f"dataset.expect.min_rows: the input has {total} rows, expected at least {expect.min_rows}")
    age = (time.time() - max(read["last"] for read in reads)) / 3600
    if expect.max_age_hours is not None and age > expect.max_age_hours:
        raise DataError(
            f"dataset.expect.max_age_hours: the newest interaction is {age:.1f} hours old, expected at most "
            f"{expect.max_age_hours}"
        )
    if expect.max_row_change_share is not None and previous.rows:
        change = abs(total - previous.rows) / previous.rows
        if change > expect.max_row_change_share:
            raise DataError(
                f"dataset.expect.max_row_change_share: {total} rows against {previous.rows} in dataset.extend_from is "
                f"a change of {change:.0%}, expected at most {expect.max_row_change_share:.0%}"
            )


def _select_items(plan: tasks.Plan, items: Any, num_chunks: int) -> Any:
    """Return the ids of the items whose rows stay: within the filter and, if there is an item file, known to it."""
    counts = tasks.load_counts([plan.work / f"items-{index:05d}.arrow" for index in range(num_chunks)])
    low, high = plan.dataset.min_item_interactions, plan.dataset.max_item_interactions
    fits = (pc.field("count") >= low) & (pc.field("count") <= (high or np.iinfo(np.int64).max))
    ids = counts.filter(fits).column("id").combine_chunks()
    return ids.filter(pc.is_in(ids, items.column("item_id").combine_chunks())) if len(items) else ids


def _build_rule(plan: tasks.Plan) -> SplitRule | None:
    method = plan.dataset.split.method
    if method == "column":
        return None
    if method == "amazon_book":
        _, start, _ = get_amazon_book_window()
        parts = [_load_bucket(plan, bucket, ["timestamp", "row"]) for bucket in range(plan.num_buckets)]
        times, rows = (
            np.concatenate([part.column(name).to_numpy() for part in parts]) for name in ("timestamp", "row")
        )
        return build_amazon_book_rule(times[times >= start], rows[times >= start])
    paths = [plan.work / f"filtered-{bucket:05d}.times.arrow" for bucket in range(plan.num_buckets)]
    counts = tasks.load_counts(paths).sort_by("id")
    return build_ratio_rule(plan.dataset.split, counts.column("id").to_numpy(), counts.column("count").to_numpy())


def _load_bucket(plan: tasks.Plan, bucket: int, columns: list[str]) -> Any:
    return read_table(plan.work / f"filtered-{bucket:05d}.arrow").select(columns)


def _draw_pool(plan: tasks.Plan, item_ids: list[str]) -> EventPool:
    """Return a sample of all events, chosen by the hash of their row, for negatives by popularity."""
    empty = np.zeros(0, dtype=np.int64)
    if plan.dataset.feedback != "implicit" or plan.dataset.negative_sampling != "popularity":
        return EventPool(empty, empty)
    parts = [_load_bucket(plan, bucket, ["timestamp", "row", "item_id"]) for bucket in range(plan.num_buckets)]
    table = pa.concat_tables(parts)
    rows = table.column("row").to_numpy()
    chosen = np.argsort(hash_integers(plan.seed, rows), kind="stable")[: tasks.POOL_SIZE]
    table = table.take(pa.array(chosen)).sort_by([("timestamp", "ascending"), ("row", "ascending")])
    items = pc.index_in(table.column("item_id"), pa.array(item_ids, pa.string()))
    return EventPool(table.column("timestamp").to_numpy(), items.to_numpy().astype(np.int64))


def _check_splits(plan: tasks.Plan, rows: dict[str, Counter[str]]) -> None:
    for name, counts in rows.items():
        if counts["real_rows"] == 0:
            sizes = ", ".join(f"{one} {count['real_rows']}" for one, count in rows.items())
            raise DataError(
                f"dataset.split: the split '{name}' is empty (rows: {sizes}) with method "
                f"'{plan.dataset.split.method}'; change its ratios, months or column"
            )


def _describe(
    plan: tasks.Plan,
    user_ids: list[str],
    item_ids: list[str],
    split_rows: dict[str, Counter[str]],
    shards: list[dict[str, Any]],
    joined: list[dict[str, Any]],
    user_ranges: list[list[tuple[int, int]]],
) -> dict[str, Any]:
    filled = [shard for shard in shards if shard]
    splits = {}
    for name in SPLITS:
        own = [shard for shard in filled if shard["info"]["split"] == name]
        splits[name] = {
            **split_rows[name],
            "contexts": sum(shard["info"]["contexts"] for shard in own),
            "first_timestamp": min(shard["first"] for shard in own),
            "last_timestamp": max(shard["last"] for shard in own),
        }
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_users": len(user_ids),
        "num_items": len(item_ids),
        "users_hash": compute_ids_hash(user_ids),
        "items_hash": compute_ids_hash(item_ids),
        "ties": plan.preprocessing.ties,
        "feedback": plan.dataset.feedback,
        "max_history_length": plan.preprocessing.max_history_length,
        "splits": splits,
        "shards": [shard["info"] for shard in filled],
        "buckets": [
            {
                "path": f"interactions/bucket-{index:05d}.parquet",
                "rows": one["rows"],
                "sha256": one["sha256"],
                "user_ranges": ranges,
            }
            for index, (one, ranges) in enumerate(zip(joined, user_ranges, strict=True))
        ],
    }
    return manifest | {"content_hash": compute_json_hash(manifest)}


def _print_summary(manifest: dict[str, Any], data_dir: Path) -> None:
    print(f"data: {manifest['num_users']:,} users, {manifest['num_items']:,} items")
    for name, split in manifest["splits"].items():
        print(f"  {name:5} {split['rows']:>12,} rows  {split['contexts']:>12,} contexts")
    for cause, count in manifest["dropped"].items():
        print(f"  left out: {count:,} rows, {cause}")
    print(f"  {data_dir / 'manifest.json'}")
