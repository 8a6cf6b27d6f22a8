"""Truncated, corrupted, mixed-up or foreign data folders: reported with a remedy, never used.

Elsewhere: cut and altered shards (tests/unit/test_shards.py, tests/unit/test_global_order.py),
records that are not JSON (tests/unit/test_run_dir.py), weights of another id table (tests/unit/test_cf_model_files.py).
"""

import json
import random
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from collm_dist.cf.cross_fit import compute_fold_starts
from collm_dist.cf.user_shards import load_worker_data
from collm_dist.data.prompts.item_tokens import load_item_tokens
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.interactions import load_interactions, load_item_table, load_user_ids
from collm_dist.data.shards.manifest import compute_content_hash, load_manifest
from collm_dist.data.shards.shard_reader import decode_block, read_shard
from collm_dist.data.shards.shard_writer import encode_block, write_shard
from collm_dist.errors import ArtifactError
from collm_dist.runs.atomic_files import compute_file_hash
from collm_dist.runs.run_dir import RunDir
from tests.unit.evaluation_run import write_data_step
from tests.unit.loader_data import make_contexts, make_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished data step with its tables."""
    run_dir = write_data_step(tmp_path_factory.mktemp("run"))
    folder = run_dir.step_dir("data")
    pq.write_table(pa.table({"user_idx": [0, 1], "user_id": ["a", "b"]}), folder / "users.parquet")
    titles = ["A", "B"]
    pq.write_table(pa.table({"item_idx": [0, 1], "item_id": titles, "title": titles, "text": titles}),
                   folder / "items.parquet")  # fmt: skip
    change_manifest(
        folder, tables={name: compute_file_hash(folder / name) for name in ("users.parquet", "items.parquet")}
    )
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "data")


def change_manifest(folder, **changes):
    """Change a manifest as one who knows how to."""
    record = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(json.dumps(record | {"content_hash": compute_content_hash(record)}))


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(data)


READERS = {
    "interactions/bucket-00001.parquet": [
        lambda folder: load_interactions(folder, ["label"]),
        lambda folder: load_worker_data(folder, load_manifest(folder)),
        lambda folder: compute_fold_starts(folder, load_manifest(folder), 2),
    ],
    "users.parquet": [load_user_ids],
    "items.parquet": [load_item_table],
    "shards/train-00000.tar": [
        lambda folder: list(GlobalOrder(folder, load_manifest(folder), "train", 0, 8).iter_batches())
    ],
}


@pytest.mark.parametrize("way", ["cut", "flipped", "of other data", "missing"])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named(folder, name, way):
    path = folder / name
    for read in READERS[name]:
        read(folder)
    if way == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif way == "flipped":
        flip(path)
    elif way == "missing":
        path.unlink()
    else:
        other = {"interactions/bucket-00001.parquet": "interactions/bucket-00002.parquet",
                 "shards/train-00000.tar": "shards/test-00000.tar"}.get(name)  # fmt: skip
        pq.write_table(pa.table({"user_id": ["x"]}), path) if other is None else shutil.copy(folder / other, path)
    for read in READERS[name]:
        with pytest.raises(ArtifactError, match=rf"{path.name}.* (damaged|missing).*--force data") as caught:
            read(folder)
        assert caught.value.exit_code == 2


def test_every_byte_of_a_shard_counts(tmp_path):
    """A flip anywhere is noticed by the checksum; without one it is read as what it says, or refused."""
    info = write_shard(tmp_path, "train-00000.tar", "train", make_contexts([2, 1, 3]), contexts_per_record=2)
    path, dice = tmp_path / info.path, random.Random(0)
    whole = path.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match="damaged"):
            list(read_shard(path, info.sha256))
        with suppress(ArtifactError):
            list(read_shard(path))


BLOCK = make_contexts([2, 1, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": np.zeros(2, np.int64)}, "different lengths"),
        ({"num_likes": np.zeros(9, np.int64)}, "different lengths"),
        ({"target_offsets": BLOCK.target_offsets + 1}, "offsets out of range"),
        ({"target_offsets": np.array([0, 5, 2, 6])}, "offsets out of range"),
        ({"history_offsets": np.array([0, 1, 2, 1000])}, "offsets out of range"),
        ({"label": np.zeros(6, np.float32)}, "not those of contexts"),
        ({"label": np.zeros((6, 1), np.int64)}, "not those of contexts"),
        ({"evil": np.zeros(1, np.int64)}, "not those of contexts"),
    ],
)
def test_records_of_another_kind(change, message):
    arrays = safetensors.numpy.load(encode_block(BLOCK)) | change
    with pytest.raises(ValueError, match=message):
        decode_block(safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in arrays.items()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: {"num_items": record["num_items"] + 1}, "was edited"),
        (lambda record: {"shards": record["shards"][1:]}, "was edited"),
        (lambda record: {"num_users": float("nan")}, "is not a manifest"),
    ],
)
def test_a_manifest_that_was_changed(folder, change, message):
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | change(record)))
    with pytest.raises(ArtifactError, match=rf"manifest\.json .*{message}.*--force data"):
        load_manifest(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "is not a manifest"), ("3", "is not a manifest"), ("[" * 100_000, "damaged"), ('{"a": 1', "damaged"),
     ("{}", "format version None"), ("\x00\xff", "damaged")],
)  # fmt: skip
def test_a_manifest_that_is_none(folder, text, message):
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=message):
        load_manifest(folder)


@pytest.mark.parametrize("path", ["../../elsewhere.tar", "/etc/passwd", "shards/../../x", "shards/", "shards/.hidden"])
def test_a_manifest_names_files_of_its_folder_only(folder, path):
    shard = json.loads((folder / "manifest.json").read_text())["shards"][0]
    change_manifest(folder, shards=[shard | {"path": path}])
    with pytest.raises(ArtifactError, match="is not a file of a data folder"):
        load_manifest(folder)


@pytest.mark.parametrize("change", [{"shards": [{"path": "shards/x"}]}, {"splits": [1]}, {"buckets": None}])
def test_a_manifest_of_another_shape(folder, change):
    change_manifest(folder, **change)
    with pytest.raises(ArtifactError, match="is not a manifest of a data step"):
        load_manifest(folder)


def test_counts_that_are_not_those_of_the_shard(folder):
    manifest = load_manifest(folder)
    shards = tuple(replace(shard, rows=shard.rows + 8) for shard in manifest.shards)
    with pytest.raises(ArtifactError, match=r"train-00000\.tar: the manifest says"):
        list(GlobalOrder(folder, replace(manifest, shards=shards), "train", 0, 8).iter_batches())


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000])
def test_a_record_that_is_none(tmp_path, text):
    run_dir = RunDir(tmp_path)
    run_dir.step_dir("cf").mkdir()
    run_dir.record_path("cf").write_text(text)
    with pytest.raises(ArtifactError, match=r"summary\.json is .*run the step 'cf' again"):
        run_dir.read_record("cf")


@pytest.mark.parametrize("way", ["cut", "flipped", "empty", "pickle"])
def test_a_damaged_table_of_tokens_is_made_anew(tmp_path, way, caplog):
    tokenizer, texts = make_tokenizer(), ["Heat", "Toy Story"]
    whole = load_item_tokens(tmp_path, texts, tokenizer, 20)
    ids, (path,) = whole.ids.tolist(), tmp_path.iterdir()
    if way == "flipped":
        flip(path, 0.9)
    elif way == "pickle":
        with path.open("wb") as file:
            np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(path.read_bytes()[:-9] if way == "cut" else b"")
    assert load_item_tokens(tmp_path, texts, tokenizer, 20).ids.tolist() == ids
    assert "is rebuilt" in caplog.text
    caplog.clear()
    assert load_item_tokens(tmp_path, texts, tokenizer, 20).ids.tolist() == ids
    assert not caplog.text
