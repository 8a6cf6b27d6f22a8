"""Properties that hold for all rows, prompts, seeds and numbers of processes.

Elsewhere: prompts against a plain reference (test_prompt_layout.py), micro-batches within their budget
(test_micro_batches.py), resuming (test_global_order.py), samples against a plain loop (test_user_samples.py), shards
(test_shards.py), cleaned texts and row filters (test_readers.py).
"""

import csv
import gzip
import io
import json
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collm_dist.config.yaml_document import dump_yaml, parse_yaml
from collm_dist.data.ingest.file_readers import NULLS
from collm_dist.data.ingest.item_texts import MAX_TEXT_CHARACTERS, clean_text
from collm_dist.data.prompts.micro_batches import plan_micro_batches
from collm_dist.data.prompts.prompt_layout import TokenCounts
from collm_dist.data.prompts.prompt_template import FIELDS, PromptTemplate
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.errors import ConfigError
from tests.unit.loader_data import make_contexts, write_split
from tests.unit.test_readers import RATINGS, items_of, read

# Any text without control characters; white space around an id and words for nothing do not count.
visible = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=12)
ids = visible.map(str.strip).filter(lambda one: one not in NULLS)
rows_strategy = st.lists(
    st.fixed_dictionaries(
        {
            "user_id": ids,
            "item_id": ids,
            "timestamp": st.integers(-(10**9), 4 * 10**9),
            "rating": st.sampled_from([0.5, 1.0, 3.5, 4.0, 5.0]),
        }
    ),
    min_size=1,
    max_size=12,
)


def write_text(path, rows, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    data = file.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_lines(path, rows):
    # In a column that looks like dates throughout, the JSON parser sees dates.
    path.write_text("".join(json.dumps(row, ensure_ascii=len(row["user_id"]) % 2 == 0) + "\n" for row in rows))


FORMATS = {
    "log.csv": write_text,
    "log.csv.gz": write_text,
    "log.tsv": lambda path, rows: write_text(path, rows, "\t"),
    "log.jsonl": write_lines,
    "log.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5),
}


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(rows=rows_strategy)
def test_rows_come_back_in_any_format(name, rows):
    with tempfile.TemporaryDirectory() as folder:
        FORMATS[name](Path(folder, name), rows)
        found, bad, _ = read(path=str(Path(folder, name)), **RATINGS)
    assert not bad
    assert found["user_id"].tolist() == [row["user_id"] for row in rows]
    assert found["item_id"].tolist() == [row["item_id"] for row in rows]
    assert found["timestamp"].tolist() == [row["timestamp"] for row in rows]
    assert found["label"].tolist() == [int(row["rating"] >= 4) for row in rows]


@settings(max_examples=30, deadline=None)
@given(rows=rows_strategy, cuts=st.lists(st.integers(0, 12), max_size=3), names=st.permutations(sorted(FORMATS)))
def test_rows_come_back_from_any_files(rows, cuts, names):
    bounds = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    with tempfile.TemporaryDirectory() as folder:
        for number, (start, stop) in enumerate(pairwise(bounds)):
            FORMATS[names[number]](Path(folder, f"{number}-{names[number]}"), rows[start:stop])
        found, bad, _ = read(path=folder, **RATINGS, timestamp_unit="s")
    assert not bad
    assert found[["user_id", "item_id"]].values.tolist() == [[row["user_id"], row["item_id"]] for row in rows]


@settings(max_examples=40, deadline=None)
@given(titles=st.dictionaries(ids, st.text(st.characters(exclude_categories=["Cs"]), max_size=1500), min_size=1))
def test_any_title_becomes_a_text(titles):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "items.parquet")
        pq.write_table(pa.table({"item_id": list(titles), "title": list(titles.values())}), path)
        log = Path(folder, "log.csv")
        log.write_text("user_id,item_id,timestamp,rating\n1,a,1000000000,5\n")
        found = items_of(path=str(log), items_path=str(path), **RATINGS)
    assert found == {item: clean_text(title) or item for item, title in titles.items()}
    assert all(len(text) <= MAX_TEXT_CHARACTERS for text in found.values())


pieces = st.one_of(st.sampled_from([*FIELDS, "<s>", "<UserId>", "<", ">", " ", "Answer:"]), st.text(max_size=8))


@settings(max_examples=300, deadline=None)
@given(text=st.lists(pieces, max_size=8).map("".join), allow_slots=st.booleans(), by_target=st.booleans())
def test_a_prompt_is_refused_or_divided_without_a_loss(text, allow_slots, by_target):
    try:
        template = PromptTemplate.parse(text, allow_slots=allow_slots, user_depends_on_target=by_target)
    except ConfigError as error:
        assert str(error).startswith("prompt.stage2" if allow_slots else "prompt.stage1")  # noqa: PT017 - either is right
        return
    assert "".join(segment.text for segment in template.segments) == text.strip()
    assert all(segment.depends_on != "target" for segment in template.prefix + template.tail)
    assert template.branch[0].depends_on == "target"
    assert not any(segment.is_slot for segment in template.prefix)
    assert any(segment.is_slot for segment in template.segments) == allow_slots
    assert len({segment.text for segment in template.segments if segment.is_field}) == sum(
        segment.is_field for segment in template.segments
    )


@settings(max_examples=30, deadline=None)
@given(
    targets=st.lists(st.integers(1, 7), min_size=1, max_size=30),
    seed=st.integers(0, 10**9),
    epoch=st.integers(0, 3),
    size=st.integers(1, 40),
    worlds=st.lists(st.tuples(st.integers(1, 4), st.integers(60, 200)), min_size=1, max_size=3),
    data=st.data(),
)
def test_a_run_that_is_moved_between_processes_trains_the_same_rows_in_each_step(
    targets, seed, epoch, size, worlds, data
):
    """Processes plan independently; together they cover the global batch, for any world size after a resume."""
    block = make_contexts(targets)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_split(Path(folder), block, num_shards=data.draw(st.integers(1, 5)))

        def start(step):
            return GlobalOrder(Path(folder), manifest, "train", seed, size).iter_batches(epoch, start_step=step)

        expected = [batch.row_id.tolist() for batch in start(0)]
        stops = sorted(data.draw(st.integers(0, len(expected))) for _ in worlds[1:])
        found = []
        for (world_size, max_tokens), first, last in zip(worlds, [0, *stops], [*stops, len(expected)], strict=True):
            ranks = [start(first) for _ in range(world_size)]
            for _ in range(first, last):
                plans = []
                for rank, batches in enumerate(ranks):
                    batch = next(batches)
                    lengths = np.full(batch.num_contexts, 11)
                    counts = TokenCounts(lengths, lengths, 1 + batch.item_idx)
                    plans.append(plan_micro_batches(batch, counts, rank, world_size, max_tokens))
                assert len({len(plan) for plan in plans}) == 1
                found.append(
                    [row for plan in plans for part in plan if part is not None for row in part.row_id.tolist()]
                )
            for batches in ranks:
                batches.close()
    assert [sorted(rows) for rows in found] == [sorted(rows) for rows in expected]
    assert sorted(row for rows in expected for row in rows) == sorted(block.row_id.tolist())


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
    | st.sampled_from(["1e5", "yes", "007", "~", "<<", "2026-01-01", "12:30", "a: b", "- x", "&a", "*a", "!!int", "%"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc_1e", min_size=1), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(value=values)
def test_settings_that_are_dumped_load_equal(value):
    assert parse_yaml(dump_yaml({"a": value})) == {"a": value}
