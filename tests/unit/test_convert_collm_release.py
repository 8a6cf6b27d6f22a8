"""The converter of the authors' pickles: its output, its errors, and hostile pickles."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from collm_dist.config import DatasetConfig
from collm_dist.data.convert_collm_release import convert_release, main
from collm_dist.data.ingest.source import open_source
from collm_dist.errors import DataError
from tests.unit.test_readers import items_of, read


def write_release(folder: Path) -> None:
    """Write the three pickles of a release, with ids and titles that repeat."""
    folder.mkdir(parents=True)
    for number, name in enumerate(("train", "valid", "test")):
        frame = pd.DataFrame(
            {
                "uid": [1, 2],
                "iid": [10 + number, 11],
                "title": [f"Film {10 + number}", "Film 11"],
                "label": [1, 0],
                "timestamp": [978300760 + number, 978300761 + number],
                "his": [[1, 2], []],
            }
        )
        frame.to_pickle(folder / f"{name}_ood2.pkl")


def test_output_is_what_the_table_format_reads(tmp_path):
    write_release(tmp_path / "data" / "ml-1m")
    with zipfile.ZipFile(tmp_path / "release.zip", "w") as archive:
        for path in (tmp_path / "data" / "ml-1m").iterdir():
            archive.write(path, f"../../{path.name}")
    for source in (tmp_path / "data", tmp_path / "release.zip"):
        output = tmp_path / f"{source.stem}-converted"
        paths = convert_release(source, output)
        assert paths == (output / "interactions.parquet", output / "items.parquet")
        dataset = {
            "path": str(paths[0]),
            "items_path": str(paths[1]),
            "columns": {"label": "label", "split": "split"},
            "split": {"method": "column"},
        }
        interactions = pq.read_table(paths[0]).to_pydict()
        assert list(interactions) == ["user_id", "item_id", "timestamp", "label", "split"]
        assert interactions["item_id"] == [10, 11, 11, 11, 12, 11]
        assert pq.read_table(paths[1]).to_pydict() == {
            "item_id": [10, 11, 12],
            "title": ["Film 10", "Film 11", "Film 12"],
        }
        rows, bad, _ = read(**dataset)
        assert rows["split"].tolist() == ["train", "train", "valid", "valid", "test", "test"]
        assert rows["label"].tolist() == [1, 0] * 3
        assert not bad
        assert items_of(**dataset) == {"10": "Film 10", "11": "Film 11", "12": "Film 12"}
        assert open_source(DatasetConfig.model_validate(dataset)).inputs()


def test_command(tmp_path, capsys):
    write_release(tmp_path / "data")
    assert main([str(tmp_path / "data"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "out" / name) for name in ("interactions.parquet", "items.parquet")
    ]
    (tmp_path / "data" / "train_ood2.pkl").unlink()
    assert main([str(tmp_path / "data"), str(tmp_path / "again")]) == 2
    assert "train_ood2.pkl is missing" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_format_collm_names_the_command():
    with pytest.raises(ValueError, match=r"python -m collm_dist\.data\.convert_collm_release"):
        DatasetConfig.model_validate({"path": "release.zip", "format": "collm", "split": {"method": "column"}})


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


def test_hostile_pickles_are_refused_before_they_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_release(tmp_path / "data")
    (tmp_path / "data" / "train_ood2.pkl").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DataError, match=r"train_ood2\.pkl: refused.*system"):
        convert_release(tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "hostile-was-here").exists()


def test_splits_with_columns_of_different_types_are_refused(tmp_path):
    write_release(tmp_path / "data")
    path = tmp_path / "data" / "test_ood2.pkl"
    frame = pd.read_pickle(path)
    frame["uid"] = ["a", "b"]
    frame.to_pickle(path)
    with pytest.raises(DataError, match="do not fit together"):
        convert_release(tmp_path / "data", tmp_path / "out")
