"""Data steps from Delta and Iceberg tables: shards equal those of Parquet files, and a run keeps its version."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from collm_dist.config import Config
from collm_dist.data.accepted_config import accept_config
from collm_dist.errors import ArtifactError
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.runs.run_dir import RunDir
from tests.integration.preprocess_runs import make_config, preprocess
from tests.lakehouse import create_iceberg_table, describe_catalog

pytestmark = pytest.mark.slow
SCHEMA = pa.schema(
    [("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64()), ("rating", pa.int64())]
)
RATED = {"columns": {"rating": "rating"}}


@pytest.fixture(scope="module", autouse=True)
def _ray():
    with connect_ray(make_config({"path": "unused", "columns": {"label": "label"}}, "unused").cluster):
        yield


def make_log(users: range) -> pa.Table:
    rows = [
        (user, item, 1_000_000_000 + 3600 * (10 * user + item), item % 5 + 1) for user in users for item in range(9)
    ]
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)


def list_hashes(manifest: dict) -> list[str]:
    return [info["sha256"] for info in (*manifest["shards"], *manifest["buckets"])]


def test_shards_equal_those_of_the_same_rows_as_parquet(tmp_path):
    parts = [make_log(range(4)), make_log(range(4, 9))]
    for number, part in enumerate(parts):
        (tmp_path / "files").mkdir(exist_ok=True)
        pq.write_table(part, tmp_path / f"files/part-{number}.parquet")
    write_deltalake(tmp_path / "delta", parts[0])
    write_deltalake(tmp_path / "delta", parts[1], mode="append")
    table = create_iceberg_table(tmp_path / "iceberg", SCHEMA)
    for part in parts:
        table.append(part)
    catalog = describe_catalog(tmp_path / "iceberg")
    plain = preprocess(make_config({**RATED, "path": str(tmp_path / "files")}, tmp_path / "plain"))
    delta = preprocess(
        make_config({**RATED, "format": "delta", "path": str(tmp_path / "delta")}, tmp_path / "of_delta")
    )
    iceberg = preprocess(
        make_config({**RATED, "format": "iceberg", "path": "shop.events", "catalog": catalog}, tmp_path / "of_iceberg")
    )
    assert list_hashes(delta) == list_hashes(plain) == list_hashes(iceberg)
    assert delta["content_hash"] == plain["content_hash"] == iceberg["content_hash"]
    assert "tables" not in plain["input"]
    assert delta["input"]["tables"]["dataset.path"] == {
        "location": str(tmp_path / "delta"), "table": "delta", "version": 1,
        "table_id": str(DeltaTable(tmp_path / "delta").metadata().id),
    }  # fmt: skip
    assert iceberg["input"]["tables"]["dataset.path"]["snapshot_id"] == table.metadata.current_snapshot_id


@pytest.fixture
def table(tmp_path) -> Path:
    write_deltalake(tmp_path / "events", make_log(range(5)))
    return tmp_path / "events"


def configure(table: Path, **settings) -> Config:
    return make_config({**RATED, "format": "delta", "path": str(table), **settings}, table.parent / "run")


def test_a_run_keeps_the_version_that_it_began_with(table, capsys):
    first = preprocess(configure(table))
    assert "(Delta table, version 0), the newest" in capsys.readouterr().out
    write_deltalake(table, make_log(range(5, 8)), mode="append")
    assert preprocess(configure(table)) == first
    said = capsys.readouterr().out
    assert "done already" in said
    assert "has moved on to 1; this run keeps the version that it began with. Set dataset.version=1" in said
    assert preprocess(configure(table, version=0)) == first  # by name it is the same version
    with pytest.raises(ArtifactError, match=r"input.dataset.path: .*'version': 0.* -> .*'version': 1"):
        preprocess(configure(table, version=1))
    run = RunDir(table.parent / "run")
    with pytest.raises(ArtifactError, match=r"'version': 0.* -> .*'version': 1"):
        accept_config(configure(table, version=1), run, own=("cf",))
    accept_config(configure(table, version=0), run, own=("cf",))
    assert preprocess(configure(table), force=True)["input"]["tables"]["dataset.path"]["version"] == 1
    assert not list((run.path / "data").glob(".*"))


def test_an_interrupted_data_step_goes_on_with_its_version(table, capsys):
    obstacle = table.parent / "run/data/shards/valid-00001.tar/obstacle"  # a folder in place of a shard
    obstacle.mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"valid-00001\.tar"):
        preprocess(configure(table))
    write_deltalake(table, make_log(range(5, 8)), mode="append")
    obstacle.rmdir()
    obstacle.parent.rmdir()
    manifest = preprocess(configure(table))
    assert manifest["input"]["tables"]["dataset.path"]["version"] == 0
    assert manifest["num_users"] == 5
    assert "has moved on to 1" in capsys.readouterr().out


def test_another_table_in_the_same_place_is_said(table):
    preprocess(configure(table))
    write_deltalake(table.with_name("other"), make_log(range(6)))
    table.rename(table.with_name("old"))
    table.with_name("other").rename(table)
    with pytest.raises(ArtifactError, match="table_id"):
        preprocess(configure(table))
