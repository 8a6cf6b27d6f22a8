"""Ids from outside the log: in requests, files of requests and files of vectors a number is the id of the log."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collm_dist.cf.models.vector_table import read_vectors
from collm_dist.data.ingest.id_forms import IdIndex
from collm_dist.errors import DataError, RequestError
from collm_dist.serving.event_log import EventLog
from collm_dist.serving.request_files import write_parts
from collm_dist.serving.requests import RankingRequest, RequestReader


def build_reader(users, items):
    zeros = np.zeros(1, np.int64)
    log = EventLog(zeros, zeros, zeros, zeros.astype(np.int8), num_users=len(users), num_items=len(items))
    return RequestReader(IdIndex(users), IdIndex(items), log, max_history_length=9, max_dislikes=9,
                         every_event_is_a_like=True)  # fmt: skip


@pytest.mark.parametrize("seven", ["7", "7.0", 7, 7.0, np.int32(7), np.float32(7)])
def test_a_number_in_a_request(seven):
    reader = build_reader(["3", "7"], ["5", "7"])
    context = reader.read_user(RankingRequest(user=seven, history=[seven, "5.0", "none"]))
    assert (context.user_idx, context.text_row, context.history.tolist()) == (1, 1, [1, 0])
    assert reader.read_candidates(RankingRequest(candidates=[seven, 5])).tolist() == [1, 0]
    with pytest.raises(RequestError, match="occurs twice"):
        reader.read_candidates(RankingRequest(candidates=["7", seven, "7.0"]))


@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf"), True, None, 1e300])
def test_other_values_are_refused(value):
    with pytest.raises(RequestError, match="is not an id"):
        build_reader(["1"], ["1"]).read_candidates(RankingRequest(candidates=[value]))


def test_texts_are_compared_as_written():
    reader = build_reader(["7", "v1"], ["7", "7.0", "x"])
    assert reader.read_user(RankingRequest(user="7.0")).user_idx == -1
    assert reader.read_user(RankingRequest(user=7.0)).user_idx == 0
    assert reader.read_candidates(RankingRequest(candidates=["7.0", "7"])).tolist() == [1, 0]


def test_a_file_of_requests_with_float_ids(tmp_path):
    table = pa.table({"user_id": [1.0, 2.0], "candidates": [[5.0, 6.0], [6.0]], "history": [["5.0"], None]})
    pq.write_table(table, tmp_path / "x.parquet")
    write_parts([tmp_path / "x.parquet"], tmp_path / "parts", ["5", "6"], retrieves=False, rows_per_part=2)
    rows = pq.read_table(tmp_path / "parts" / "part-00000.parquet").to_pylist()
    assert [(row["user_id"], row["candidates"]) for row in rows] == [("1", ["5", "6"]), ("2", ["6"])]
    texts = pa.table({"user_id": ["1", "2", "3"], "candidates": [["5.0", "6"], ["6.0"], ["5"]]})
    pq.write_table(texts, tmp_path / "y.parquet")
    write_parts([tmp_path / "y.parquet"], tmp_path / "texts", ["5", "6"], retrieves=False, rows_per_part=9)
    rows = pq.read_table(tmp_path / "texts" / "part-00000.parquet").to_pylist()
    assert [row["candidates"] for row in rows] == [["5", "6"], ["6"], ["5"]]
    with pytest.raises(RequestError, match=r"'5\.0' is not in the run's item table"):
        write_parts([tmp_path / "y.parquet"], tmp_path / "z", ["5", "6", "x"], retrieves=False, rows_per_part=9)
    pq.write_table(pa.table({"user_id": [1.5], "candidates": [["5"]]}), tmp_path / "w.parquet")
    with pytest.raises(RequestError, match="the column has type double"):
        write_parts([tmp_path / "w.parquet"], tmp_path / "w", ["5"], retrieves=False, rows_per_part=9)


def test_vectors_of_ids_as_floats(tmp_path):
    path = tmp_path / "v.parquet"
    for ids in ([1.0, 2.0], ["1.0", "2"], [1, 2]):
        pq.write_table(pa.table({"id": ids, "vector": [[1.0, 0.0], [0.0, 1.0]]}), path)
        assert read_vectors(path, ["2", "1"], 2).tolist() == [[0, 1], [1, 0]]
    pq.write_table(pa.table({"id": ["1.0", "1"], "vector": [[1.0], [0.0]]}), path)
    with pytest.raises(DataError, match="'1' occurs twice"):
        read_vectors(path, ["1", "2"], 1)
