"""Preview of a raw log: the facts of its first rows, read as the data step reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.data.ingest.file_format import BadRows
from collm_dist.data.ingest.id_forms import describe_forms, unify_items, unify_table
from collm_dist.data.ingest.input_facts import InputFacts, describe_input, format_dropped, format_facts
from collm_dist.data.ingest.normalize import SCHEMA
from collm_dist.data.ingest.source import ReadBatch, Source
from collm_dist.data.ingest.user_texts import preview_users

# Small logs are read whole, which takes seconds; of larger ones whole blocks until there are so many rows.
MAX_ROWS = 1_000_000
MAX_ITEM_BYTES = 256 << 20


def preview_rows(source: Source, max_rows: int = MAX_ROWS) -> list[str]:
    """Return lines with the facts of a log's rows, or of its first rows if it has more than ``max_rows``.

    Raises:
        DataError: a file cannot be read, or lacks a column.
    """
    batches = chain.from_iterable(source.read_chunk(chunk) for chunk in source.chunks)
    facts, bad_rows, notes, rows_read, tables = InputFacts(), BadRows(), Counter[str](), 0, [SCHEMA.empty_table()]
    for batch in _take(batches, max_rows):
        rows_read += batch.rows_read
        bad_rows.merge(BadRows(batch.bad, batch.bad_examples, batch.first_bad))
        notes.update(batch.notes)
        facts.add(batch.table, batch.ratings, has_times=source.columns.timestamp is not None)
        tables.append(batch.table.select(SCHEMA.names))
    is_whole = next(batches, None) is None
    inputs = source.inputs()
    item_bytes = sum(int(inputs[uri]["size"] or 0) for uri in source.items_uris)
    item_file = source.read_items() if 0 < item_bytes <= MAX_ITEM_BYTES else None
    catalogue = None if item_file is None else item_file.table
    whole = facts.settle_ids(catalogue, {})
    ids = {name: unify_table(pa.concat_tables(tables), whole).column(name) for name in ("user_id", "item_id")}
    catalogue = unify_items(catalogue) if catalogue is not None and "item_id" in whole else catalogue
    num_events = pc.value_counts(ids["user_id"]).field("counts")
    users = len(num_events), int(pc.sum(pc.equal(num_events, 1)).as_py() or 0)
    record = describe_input(facts, source.dataset, ids["item_id"].unique(), catalogue, users)
    which = f"all {rows_read:,} rows" if is_whole else f"the first {rows_read:,} rows; the data step reads all"
    lines = [f"facts of {which}, {facts.rows:,} of them usable:", *format_facts(record, source.dataset)]
    if item_bytes > MAX_ITEM_BYTES:
        lines.append(f"titles: the item file has {item_bytes / 2**20:,.0f} MiB; only the data step reads it")
    lines += describe_forms(facts.forms, whole)
    lines += format_dropped(bad_rows.counts + notes, bad_rows.first)
    if item_file is not None:
        lines += [f"item file, {line}" for line in format_dropped(item_file.bad_rows.counts, item_file.bad_rows.first)]
        lines += [f"items: {count:,} x {cause}" for cause, count in sorted(item_file.mended.items())]
    return lines + preview_users(source.dataset, ids["user_id"].unique())


def _take(batches: Iterator[ReadBatch], max_rows: int) -> Iterator[ReadBatch]:
    """Yield batches until they have ``max_rows`` raw rows."""
    rows = 0
    while rows < max_rows and (batch := next(batches, None)) is not None:
        rows += batch.rows_read
        yield batch
