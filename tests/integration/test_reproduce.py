"""The reproduction at tiny size: two variants, interrupted and resumed, with record and page."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY

SMALL = [
    *("preprocessing.num_user_buckets=2", "preprocessing.num_shards=2", "cf.embedding_dim=4", "cf.num_epochs=2"),
    *("prompt.history_length=2", "mapping.hidden_multiple=2", "evaluation.bootstrap_samples=20"),
    *(f"{stage}.max_steps=2" for stage in ("stage1", "stage2")),
    *("cluster.zero_stage=0", "cluster.ray_num_cpus=2", "cluster.object_store_gb=0.1"),
    *("monitoring.tensorboard=false", "monitoring.progress_bar=false"),
]


@pytest.fixture
def released(tiny_ratings, tmp_path):
    """The tiny ratings in the form of the released split."""
    ratings = csv.read_csv(tiny_ratings / "ratings.csv")
    label = (ratings.column("rating").to_numpy() >= 4).astype(np.int8)
    place = np.arange(len(ratings)) / len(ratings)
    split = np.where(place < 0.6, "train", np.where(place < 0.8, "valid", "test"))
    folder = tmp_path / "released"
    folder.mkdir()
    columns = {name: ratings.column(name) for name in ("user_id", "item_id", "timestamp")}
    pq.write_table(pa.table(columns | {"label": label, "split": split}), folder / "interactions.parquet")
    pq.write_table(csv.read_csv(tiny_ratings / "items.csv"), folder / "items.parquet")
    return folder


def wait_for_children(pid):
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(pid).children()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return children


@pytest.mark.slow
def test_variants_run_stop_and_are_kept(released, tiny_backbone_dir, tmp_path):
    command = [sys.executable, "-m", "benchmarks.reproduce", "--data-set", "ml1m", "--data", str(released)]
    command += ["--work", str(tmp_path / "runs"), "--output", str(tmp_path), "--page", str(tmp_path / "results.md")]
    command += ["--variants", "titles", "likes", "--overrides", f"llm.backbone={tiny_backbone_dir}", *SMALL]

    def run(*more):
        return subprocess.run([*command, *more], cwd=REPOSITORY, capture_output=True, text=True, timeout=800)

    early = run("--minutes", "0.05")
    assert early.returncode == 75, early.stdout + early.stderr
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        (pipeline,) = wait_for_children(process.pid)
        time.sleep(3)
        process.terminate()
        assert process.wait(timeout=120) == 75
        assert not pipeline.is_running()
    assert json.loads((tmp_path / "runs" / "titles-0" / "seconds.json").read_text()) > 3
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "reproduce_ml1m.json").read_text())
    assert [cell["variant"] for cell in result["cells"]] == ["titles", "likes"]
    assert len(result["not_run"]) == 6
    assert {(row["variant"], row["versus"]) for row in result["against"]} == {("likes", "titles")}
    models = {(row["variant"], row["model"]) for row in result["rows"]}
    assert {("titles", "blend"), ("likes", "anchor"), ("likes", "stage2")} <= models
    assert "likes alone: no dislikes" in (tmp_path / "results.md").read_text()
    shutil.rmtree(tmp_path / "runs")
    again = run()
    assert again.stdout.count("done") == 2, again.stdout + again.stderr
