"""Versions of tables that a run keeps: found once, said when a table moves on, replaced only when that is asked for."""

from __future__ import annotations

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from collm_dist.config import Config
from collm_dist.data.accepted_config import accept_config
from collm_dist.data.ingest.lake_tables import open_tables
from collm_dist.data.step_fingerprints import compute_step_fingerprint
from collm_dist.data.table_pins import drop_pins, find_versions, list_moved, pin_tables
from collm_dist.errors import ArtifactError
from collm_dist.runs.fingerprints import is_step_current
from collm_dist.runs.run_dir import RunDir

ROWS = pa.table({"user_id": [1], "item_id": ["a"]})


def configure(folder, **settings) -> Config:
    dataset = {"format": "delta", "path": str(folder / "t"), "feedback": "implicit", "columns": {"timestamp": None}}
    return Config.model_validate({"run": {"dir": str(folder / "run")}, "dataset": {**dataset, **settings}})


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run whose data step is done with version 0 of a table that is at version 1."""
    write_deltalake(tmp_path / "t", ROWS)
    run_dir = RunDir(tmp_path / "run")
    assert find_versions(configure(tmp_path).dataset, run_dir)[0].version == 0
    fingerprint = compute_step_fingerprint(configure(tmp_path), run_dir, "data")
    run_dir.write_record("data", {"fingerprint": fingerprint, "content_hash": "x"})
    drop_pins(run_dir)
    write_deltalake(tmp_path / "t", ROWS, mode="append")
    return run_dir


def test_the_version_found_is_kept_until_the_step_is_done(tmp_path):
    write_deltalake(tmp_path / "t", ROWS)
    dataset, run_dir = configure(tmp_path).dataset, RunDir(tmp_path / "run")
    assert pin_tables(dataset, run_dir).version is None
    find_versions(dataset, run_dir)
    write_deltalake(tmp_path / "t", ROWS, mode="append")
    pinned, tables = find_versions(dataset, run_dir)
    assert pinned.version == tables["dataset.path"].version == 0
    assert len(list_moved(dataset, tables)) == 1
    assert find_versions(configure(tmp_path, version=1).dataset, run_dir)[0].version == 1
    assert find_versions(dataset, run_dir)[0].version == 1  # begun again
    (run_dir.path / "data/.tables.json").write_text("[")
    write_deltalake(tmp_path / "t", ROWS, mode="append")
    assert find_versions(dataset, run_dir)[0].version == 2
    write_deltalake(tmp_path / "t", ROWS, mode="append")
    assert find_versions(dataset, run_dir, force=True)[0].version == 3


def test_a_finished_step_keeps_its_version(run, tmp_path):
    for settings in ({}, {"version": 0}):
        config = configure(tmp_path, **settings)
        assert is_step_current(run, "data", compute_step_fingerprint(config, run, "data"))
        accept_config(config, run)
        accept_config(config, run, own=("cf",))


@pytest.mark.parametrize("own", [("data",), ("cf",)])
def test_another_version_is_refused_by_every_command(run, tmp_path, own):
    with pytest.raises(
        ArtifactError, match=r"input\.dataset\.path: .*'version': 0.* -> .*'version': 1.*\n.*--force data"
    ):
        accept_config(configure(tmp_path, version=1), run, own=own)


def test_a_table_that_moved_on_is_said(run, tmp_path):
    dataset = configure(tmp_path).dataset
    (line,) = list_moved(dataset, open_tables(pin_tables(dataset, run)))
    assert "version 0) has moved on to 1; this run keeps" in line
    assert "Set dataset.version=1 with --force data" in line
    assert not list_moved(configure(tmp_path, version=0).dataset, open_tables(pin_tables(dataset, run)))


def test_a_table_elsewhere_is_not_kept_at_the_version_of_the_first(run, tmp_path):
    assert pin_tables(configure(tmp_path, path=str(tmp_path / "other")).dataset, run).version is None
