"""Id tables: indices never change, and users of a bucket are neighbours."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from collm_dist.data.ingest.id_tables import (
    PreviousTables,
    assign_users,
    compute_ids_hash,
    sort_naturally,
    write_item_table,
    write_user_table,
)
from collm_dist.data.shards.manifest import BucketInfo


def found(*buckets: list[str]) -> list[pa.Array]:
    return [pa.array(sorted(ids), pa.string()) for ids in buckets]


def test_users_are_numbered_bucket_by_bucket(tmp_path):
    tables, ranges = assign_users(PreviousTables(), found(["b", "a"], [], ["c"]))
    assert write_user_table(tmp_path / "users.parquet", tables) == ["a", "b", "c"]
    assert ranges == [[(0, 2)], [], [(2, 1)]]
    assert pq.read_table(tmp_path / "users.parquet").to_pydict() == {"user_idx": [0, 1, 2], "user_id": ["a", "b", "c"]}


def test_extending_keeps_indices_and_appends_a_slice_to_each_bucket(tmp_path):
    slices = (((0, 2),), (), ((2, 1),))
    buckets = tuple(BucketInfo(path="", rows=0, user_ranges=ranges, sha256="") for ranges in slices)
    previous = PreviousTables(user_ids=("a", "b", "c"), item_ids=(), buckets=buckets, rows=0)
    tables, ranges = assign_users(previous, found(["b", "z"], ["d"], ["c", "e", "f"]))
    ids = write_user_table(tmp_path / "users.parquet", tables)
    assert ids == ["a", "b", "c", "z", "d", "e", "f"]  # "a" is no longer in the data and keeps its index
    assert ranges == [[(0, 2), (3, 1)], [(4, 1)], [(2, 1), (5, 2)]]
    assert [table.column("id").to_pylist() for table in tables] == [["a", "b", "z"], ["d"], ["c", "e", "f"]]


def test_hashes_tell_tables_apart():
    assert compute_ids_hash(["a", "b"]) == compute_ids_hash(iter(["a", "b"]))
    assert len({compute_ids_hash(ids) for ids in (["a", "b"], ["b", "a"], ["ab"], ["a"], [])}) == 5


def test_numbers_sort_as_numbers():
    assert sort_naturally(["10", "9", "b", "a2", "1"]) == ["1", "9", "b", "10", "a2"]


def test_an_item_without_a_row_stands_for_itself(tmp_path):
    items = pa.table({"item_id": ["x", "y"], "title": ["X", "Y"], "text": ["X (1)", "Y (2)"]})
    missing, texts = write_item_table(tmp_path / "items.parquet", ["y", "q"], items)
    table = pq.read_table(tmp_path / "items.parquet").to_pydict()
    assert table == {"item_idx": [0, 1], "item_id": ["y", "q"], "title": ["Y", "q"], "text": ["Y (2)", "q"]}
    assert missing == 1
    other = items.set_column(2, "text", pa.array(["X (1)", "Y (3)"]))
    assert write_item_table(tmp_path / "items.parquet", ["y", "q"], other)[1] != texts
