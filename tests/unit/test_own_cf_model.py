"""Custom CF models: a table of external vectors, and a class by its import path."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from collm_dist.cf.model_files import load_cf_model
from collm_dist.cf.models.registry import check_arguments, get_model_class
from collm_dist.cf.models.vector_table import read_vectors, read_width
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ConfigError, DataError
from collm_dist.orchestration.pretrain import run_pretrain
from tests.examples.own_cf_model import RecentLikes
from tests.unit.cf_data import fit_and_export, make_cf
from tests.unit.evaluation_run import NUM_ITEMS, NUM_USERS, build_config, write_data_step
from tests.unit.test_cf_model_files import ITEMS, USERS, write_tables

OWN = "tests.examples.own_cf_model:RecentLikes"


def write_vectors(path, ids, vectors):
    pq.write_table(pa.table({"id": ids, "vector": [list(map(float, vector)) for vector in vectors]}), path)
    return str(path)


def test_a_class_by_import_path_is_trained_exported_and_loaded(tmp_path):
    run_dir = write_data_step(tmp_path)
    fit_and_export(run_dir, make_cf(OWN, arguments={"half_life": 5}), tmp_path / "states")
    loaded = load_cf_model(run_dir, load_manifest(run_dir.step_dir("data")))
    assert type(loaded.final) is RecentLikes
    assert loaded.final.half_life == 5
    history = torch.tensor([[-1, 3, 4], [-1, 4, 3]])
    scores = loaded.score(torch.tensor([1, 1]), history, torch.tensor([2, 2]))
    assert scores[0] != scores[1]
    vectors = loaded.final.items(torch.tensor([3, 4]))[:, :-1]
    expected = (0.5**0.2 * vectors[0] + vectors[1]) / (0.5**0.2 + 1)
    item = loaded.final.items(torch.tensor([2]))[0]
    biases = loaded.final.global_bias + loaded.final.users.weight[1, -1] + item[-1]
    assert scores[0].item() == pytest.approx((biases + expected @ item[:-1]).item(), abs=1e-5)


@pytest.mark.parametrize("with_users", [True, False])
def test_a_table_of_vectors_is_read_and_only_biases_and_gain_are_learned(tmp_path, with_users):
    run_dir, random = write_data_step(tmp_path), np.random.default_rng(0)
    write_tables(run_dir, USERS, ITEMS)
    items = random.normal(size=(NUM_ITEMS, 5)).astype(np.float32)
    users = random.normal(size=(NUM_USERS, 5)).astype(np.float32)
    shuffled = random.permutation(NUM_ITEMS)
    settings = {"item_vectors": write_vectors(tmp_path / "items.parquet", np.array(ITEMS)[shuffled], items[shuffled])}
    if with_users:
        settings["user_vectors"] = write_vectors(tmp_path / "users.parquet", [*USERS, "stranger"], [*users, users[0]])
    fit_and_export(run_dir, make_cf("table", **settings), tmp_path / "states")
    loaded = load_cf_model(run_dir, load_manifest(run_dir.step_dir("data")))
    model, number = loaded.final, torch.arange(10)
    history = torch.tensor([[1, 2]]).expand(10, 2)
    scores = loaded.score(number, history, number)
    user_vectors = users[:10] if with_users else np.repeat(items[[1, 2]].mean(0)[None], 10, axis=0)
    matched = (user_vectors * items[:10]).sum(1) * model.gain.item()
    biases = model.global_bias + model.users.weight[:10, -1] + model.items(number)[:, -1]
    assert np.abs(scores.numpy() - matched - biases.numpy()).max() < 1e-5
    assert model.gain.item() != 0
    relative = loaded.item_vectors(number, torch.zeros(10))[:, :-1] / model.item_scale
    assert np.abs(relative.numpy() - items[:10]).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("svd", "neither one of mf, lightgcn, sasrec, din, table, none nor an import path"),
        ("no.such.module:Model", r"cannot be imported.*PYTHONPATH"),
        ("tests.examples.own_cf_model:Nothing", "cannot be imported"),
        ("collections:OrderedDict", r"not a subclass of collm_dist\.cf\.models\.TrainableCfModel"),
    ],
)
def test_invalid_classes_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        get_model_class(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"half_life": 5, "half_lif": 5}, r"cf\.arguments: .*'half_lif'.* takes half_life"),
        ({}, r"cf\.arguments: missing a required argument: 'half_life'"),
        ({"half_life": 5, "num_users": 3}, r"cf\.arguments: .*num_users"),
    ],
)
def test_invalid_arguments_are_refused_before_work_starts(arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_arguments(make_cf(OWN, arguments=arguments))
    check_arguments(make_cf(OWN, arguments={"half_life": 5}))


IDS = ["a", "b"]
MISTAKES = {
    "other columns": ({"id": IDS, "embedding": [[1.0], [2.0]]}, r" has no column vector, it has id, embedding; rename"),
    "text": ({"id": IDS, "vector": ["x", "y"]}, r", row 0, field 'vector': .* string; make it a list of numbers"),
    "list of texts": ({"id": IDS, "vector": [["x"], ["y"]]}, r", row 0, field 'vector': .* make it a list of numbers"),
    "matrices": ({"id": IDS, "vector": [[[1.0]], [[2.0]]]}, r", row 0, field 'vector': .* make it a list of numbers"),
    "empty first": ({"id": IDS, "vector": [[], [1.0]]}, r", row 0, field 'vector': it is empty; leave out ids"),
    "length": ({"id": IDS, "vector": [[1.0, 2.0], [3.0, 4.0, 5.0]]}, r", row 1, field 'vector': 3 numbers, not 2; all"),
    "null": (
        {"id": IDS, "vector": [[1.0, 2.0], None]},
        r", row 1, field 'vector': 0 numbers, not 2; all vectors .*same length",
    ),
    "nan": (
        {"id": IDS, "vector": [[1.0], [float("nan")]]},
        r", row 1, field 'vector': not finite .*; correct it or le",
    ),
    "too large": ({"id": IDS, "vector": [[1.0], [1e300]]}, r", row 1, field 'vector': not finite in float32; correct"),
    "twice": ({"id": ["a", "x", "a"], "vector": [[1.0]] * 3}, r", row 2, field 'id': 'a' occurs twice; keep one row"),
    "no id": ({"id": ["a", None], "vector": [[1.0]] * 2}, r", row 1, field 'id': it is empty; set it or leave the r"),
    "no rows": ({"id": pa.array([], pa.string()), "vector": pa.array([], pa.list_(pa.float32()))}, " has no rows; it "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_tables_are_refused_by_file_row_field_and_remedy(tmp_path, mistake):
    columns, message = MISTAKES[mistake]
    path = tmp_path / "v.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=r"v\.parquet" + message):
        read_vectors(path, IDS, read_width(path))


def test_rows_are_counted_over_the_whole_file(tmp_path):
    """Files are read in batches of 65,536 rows; both mistakes are in the second batch."""
    path, ids = tmp_path / "v.parquet", [str(number) for number in range(70_000)]
    vectors = [[1.0]] * len(ids)
    write_vectors(path, [*ids, "3"], [*vectors, [1.0]])
    with pytest.raises(DataError, match=r"row 70000, field 'id': '3' occurs twice"):
        read_vectors(path, ids, 1)
    write_vectors(path, ids, [*vectors[:-1], [1.0, 2.0]])
    with pytest.raises(DataError, match=r"row 69999, field 'vector': 2 numbers, not 1"):
        read_vectors(path, ids, 1)


def test_files_that_are_not_parquet_are_refused(tmp_path):
    path = tmp_path / "v.parquet"
    for wrong in (path, tmp_path):  # a missing file and a folder
        with pytest.raises(DataError, match="is missing; it should be a Parquet file"):
            read_vectors(wrong, IDS, 1)
    path.write_text("no parquet")
    with pytest.raises(DataError, match=r"v\.parquet is damaged or not a Parquet file .* write it again"):
        read_width(path)
    write_vectors(path, IDS, [[1.0], [2.0]])
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 30 + content[34:])
    with pytest.raises(DataError, match=r"(?s)v\.parquet is damaged or not a Parquet file .* write it again"):
        read_vectors(path, IDS, 1)


@pytest.mark.parametrize("field", ["item_vectors", pytest.param("user_vectors", marks=pytest.mark.slow)])
def test_the_command_ends_with_code_2_and_no_traceback(tmp_path, repository, field):
    run_dir = write_data_step(tmp_path / "run")
    write_tables(run_dir, USERS, ITEMS)
    files = {"item_vectors": (ITEMS, "items.parquet"), "user_vectors": (USERS, "users.parquet")}
    vectors = {name: write_vectors(tmp_path / file, ids, np.ones((len(ids), 2))) for name, (ids, file) in files.items()}
    ids, file = files[field]
    write_vectors(tmp_path / file, ids, [[1.0, 2.0], [float("inf"), 0.0], *np.ones((len(ids) - 2, 2))])
    config = build_config(run_dir.path).model_copy(update={"cf": make_cf("table", **vectors)})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, str(repository / "launch" / "pretrain_cf.py"), "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path / file}, row 1, field 'vector': not finite" in done.stderr
    assert "leave the row out" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_table_of_other_ids_is_refused_before_work_starts(tmp_path):
    run_dir = write_data_step(tmp_path)
    write_tables(run_dir, USERS, ITEMS)
    path = write_vectors(tmp_path / "v.parquet", ["x", "y"], [[1.0, 2.0], [3.0, 4.0]])
    config = build_config(tmp_path)
    config = config.model_copy(update={"cf": make_cf("table", item_vectors=path)})
    with pytest.raises(DataError, match=r"v\.parquet has a vector for none of the data's ids, such as 'item 0'"):
        run_pretrain(config, run_dir)
    assert not run_dir.step_dir("cf").exists() or not any(run_dir.step_dir("cf").iterdir())
