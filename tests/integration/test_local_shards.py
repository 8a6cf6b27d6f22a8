"""Shards on a local disk: copied once, verified, and without effect on training."""

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from collm_dist.config.loader import load_config
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.local_shards import LocalShards, build_local_shards
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ArtifactError, DiskError
from collm_dist.monitoring import TRAIN_LOSS, read_metrics
from collm_dist.runs.publish import Publisher
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.run_stage import run_stage


@pytest.fixture
def data_dir(finished_run, tmp_path):
    """Return a copy of a data folder, which a test may damage."""
    return shutil.copytree(finished_run / "data", tmp_path / "run" / "data")


def test_copies_are_made_once_and_mended(data_dir, tmp_path):
    shard = load_manifest(data_dir).shards[0]
    local = LocalShards(tmp_path / "local", data_dir)
    path = local.fetch(shard)
    assert path.read_bytes() == (data_dir / shard.path).read_bytes()
    made = path.stat().st_ino
    assert (
        LocalShards(tmp_path / "local", tmp_path / "nowhere").fetch(shard) == path
    )  # another run's, of the same bytes
    assert local.fetch(shard).stat().st_ino == made
    path.write_bytes(path.read_bytes()[:-5] + b"wrong")
    (tmp_path / "local" / f".{path.name}.left.tmp").write_bytes(b"of a process that was killed")
    assert local.fetch(shard).read_bytes() == (data_dir / shard.path).read_bytes()
    assert {file.name for file in (tmp_path / "local").iterdir()} == {".lock", path.name}


def test_many_processes_of_a_machine_copy_once(data_dir, tmp_path):
    shard, found = load_manifest(data_dir).shards[0], []

    def fetch():
        found.append(LocalShards(tmp_path / "local", data_dir).fetch(shard).stat().st_ino)

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_what_is_damaged_or_missing_comes_from_where_it_was_published(finished_run, data_dir, tmp_path):
    uri = str(tmp_path / "there" / "run")
    Publisher(uri, RunDir(finished_run), show_progress=False).publish_step("data")
    settings = [f"run.dir={data_dir.parent}", f"run.publish_to={tmp_path / 'there'}"]
    config = load_config(finished_run / "config.yaml", [*settings, f"cluster.local_scratch={tmp_path / 'local'}"])
    local = build_local_shards(config, data_dir)
    first, second, *_ = shards = load_manifest(data_dir).shards
    whole = [(data_dir / shard.path).read_bytes() for shard in shards]
    (data_dir / first.path).write_bytes(whole[0][:-5] + b"wrong")
    (data_dir / second.path).unlink()
    assert [local.fetch(shard).read_bytes() for shard in shards] == whole
    (tmp_path / "there" / "run" / "data" / second.path).write_bytes(b"neither")
    shutil.rmtree(tmp_path / "local")
    with pytest.raises(ArtifactError, match=r"is missing; fetching it from .*the shard is damaged"):
        build_local_shards(config, data_dir).fetch(second)
    with pytest.raises(ArtifactError, match=r"the shard is damaged .*restore it"):
        LocalShards(tmp_path / "local", data_dir).fetch(first)
    assert not list((tmp_path / "local").glob("*.tar"))


def test_a_disk_without_room_is_named(data_dir, tmp_path):
    shard = load_manifest(data_dir).shards[0]
    with pytest.raises(DiskError, match=r"cluster\.local_scratch: .* MiB free; remove copies of other runs"):
        LocalShards(tmp_path / "local", data_dir).fetch(replace(shard, bytes=1 << 60))
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"cluster\.local_scratch: .*file"):
        LocalShards(tmp_path / "file", data_dir).fetch(shard)


def test_order_and_losses_are_the_same(finished_run, tmp_path):
    data_dir, manifest = finished_run / "data", load_manifest(finished_run / "data")
    local = LocalShards(tmp_path / "local", data_dir)
    orders = [GlobalOrder(data_dir, manifest, "train", 7, 16, local_shards=source) for source in (None, local)]
    for ours, theirs in zip(*(order.iter_batches(1) for order in orders), strict=True):
        assert all(np.array_equal(getattr(ours, name), value) for name, value in vars(theirs).items())
    for shard in manifest.shards:
        local.fetch(shard)
    trained = [train_stage2(finished_run, tmp_path / "plain"), train_stage2(finished_run, tmp_path / "run", local)]
    assert trained[0][0]
    assert trained[0] == trained[1]


def train_stage2(finished_run, folder, local=None):
    """Train stage 2 in a copy of a run, without the original shards if local ones are used; return losses, mapping."""
    run, settings = Path(shutil.copytree(finished_run, folder, symlinks=True)), [f"run.dir={folder}"]
    if local is not None:
        settings.append(f"cluster.local_scratch={local.fetch(load_manifest(run / 'data').shards[0]).parent}")
        for path in (run / "data" / "shards").iterdir():
            path.unlink()
    before = dict(os.environ)
    run_stage(load_config(finished_run / "config.yaml", settings), RunDir(run), "stage2", force=True)
    for name in set(os.environ) - set(before):
        del os.environ[name]
    metrics = read_metrics(run / "stage2" / "metrics.jsonl")
    losses = [line[TRAIN_LOSS] for line in metrics if TRAIN_LOSS in line]
    return losses, (run / "stage2" / "mapping.safetensors").read_bytes()
