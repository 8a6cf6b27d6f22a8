"""Damaged files of a finished run: named with the remedy wherever they are used, never used."""

import json
import os
import re
import shutil

import pytest

from collm_dist import load_recommender
from collm_dist.config.loader import load_config
from collm_dist.errors import ArtifactError, CollmError
from collm_dist.orchestration.pipeline import _is_done_or_linked
from collm_dist.runs.file_hashes import check_files, hash_products, read_hashes, read_state
from collm_dist.runs.publish import Publisher
from collm_dist.runs.reuse import find_reusable
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.licences import Licences
from collm_dist.tuning.loaded_stage import load_llm
from collm_dist.tuning.run_stage import run_stage
from tests.golden.make_run import set_input_times

WEIGHTS = {
    "cf": "model.safetensors",
    "stage1": "merged/model.safetensors",
    "stage2": "mapping.safetensors",
}


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of it; the working directory is the folder around it."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(folder)
    set_input_times(folder)
    return RunDir(folder / "run")


def flip(path):
    """Flip the lowest bit of a byte near the end: a value of a tensor."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_all_weights_have_recorded_hashes(run):
    assert {"merged/model.safetensors", "merged/tokenizer.json", "adapter/adapter_model.safetensors"} <= read_hashes(
        run, "stage1"
    ).keys()
    assert read_hashes(run, "stage2").keys() == {"mapping.safetensors"}
    assert "interactions/bucket-00000.parquet" in read_hashes(run, "data")
    for step in ("data", "cf", "stage1", "stage2"):
        check_files(run, step)


@pytest.mark.parametrize("step", WEIGHTS)
def test_one_flipped_bit_is_found_wherever_weights_are_used(run, step, tmp_path):
    config, path = load_config(run.path / "config.yaml"), run.step_dir(step) / WEIGHTS[step]
    load_recommender(run.path, "cpu")
    exported = export_model(config, run, tmp_path / "export", Licences("a", "b", "c"))
    flip(path)
    message = rf"{path.name}.* is damaged .*--force"
    fingerprint = run.read_record(step)["fingerprint"]
    uses = {
        "load": lambda: load_recommender(run.path, "cpu"),
        "publish": lambda: Publisher(str(tmp_path / "published"), run, False).publish_step(step),
        "export": lambda: export_model(config, run, tmp_path / "again", Licences("a", "b", "c")),
        "reuse": lambda: find_reusable(step, fingerprint, [str(run.path)]),
        "pipeline": lambda: _is_done_or_linked(config, run, step),
    }
    if step in ("cf", "stage1"):
        uses["resume"] = lambda: run_stage(config, run, "stage2", force=True)
    for use in uses.values():
        with pytest.raises(ArtifactError, match=message):
            use()
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "published").exists()
    imported = import_model(exported, RunDir(tmp_path / "imported"))
    flip(imported.step_dir(step) / WEIGHTS[step])
    with pytest.raises(ArtifactError, match=message):
        load_recommender(imported.path, "cpu")


def test_the_mapping_of_release_0_1_is_compared_with_its_content_hash(run):
    path = run.record_path("stage2")
    record = json.loads(path.read_text())
    del record["files"], record["record_hash"]
    path.write_text(json.dumps(record))
    load_recommender(run.path, "cpu")
    flip(run.step_dir("stage2") / "mapping.safetensors")
    with pytest.raises(ArtifactError, match=r"mapping\.safetensors is damaged"):
        load_recommender(run.path, "cpu")


def test_a_changed_record_is_found(run):
    path = run.record_path("stage2")
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))
    with pytest.raises(ArtifactError, match=r"summary\.json is damaged .*--force"):
        load_recommender(run.path, "cpu")


def test_a_kept_result_costs_no_second_reading(run):
    check_files(run, "stage1", keep=True)
    path = run.step_dir("stage1") / WEIGHTS["stage1"]
    kept = json.loads((run.path / ".hashes.json").read_text())
    assert kept["stage1/merged/model.safetensors"][0] == read_state(path)
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy that keeps times, or one who hides it
    with pytest.raises(ArtifactError, match="is damaged"):
        check_files(run, "stage1", keep=True)
    (run.path / ".hashes.json").write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        check_files(run, "stage1", keep=True)


def break_file(path, way):
    if way == "junk":
        path.write_bytes(b"\x00\xff{[" * 50)
    elif way == "cut":
        path.write_bytes(path.read_bytes()[:40])
    else:
        path.unlink()
        if way == "directory":
            path.mkdir()
        elif way == "dangling link":
            path.symlink_to("nowhere")


BROKEN = ["junk", "cut", "gone", "directory", "dangling link"]
# Without the hashes that releases after 0.1 record, the libraries that parse a file are the first to notice.
PARSED = [
    "cf/model.safetensors",
    "stage1/merged/config.json",
    "stage1/merged/model.safetensors",
    "stage1/merged/tokenizer.json",
    "stage2/mapping.safetensors",
    "cf/summary.json",
    "stage2/summary.json",
    "data/manifest.json",
]


@pytest.mark.parametrize("way", BROKEN)
def test_files_without_recorded_hashes_are_refused_in_words(run, way):
    for step in ("cf", "stage1", "stage2"):
        path = run.record_path(step)
        record = json.loads(path.read_text())
        for key in ("files", "record_hash"):
            record.pop(key, None)
        path.write_text(json.dumps(record))
    for name in PARSED:
        path = run.path / name
        copy = path.read_bytes()
        break_file(path, way)
        with pytest.raises(ArtifactError, match=re.escape(str(path.parent))):
            load_recommender(run.path, "cpu")
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(copy)
    load_recommender(run.path, "cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("way", ["junk", "cut", "directory"])
def test_a_damaged_backbone_of_the_user_is_refused_in_words(run, name, way):
    break_file(run.path.parent / "backbone" / name, way)
    with pytest.raises(CollmError, match=r"llm\.backbone: 'backbone' cannot be loaded") as caught:
        load_llm(load_config(run.path / "config.yaml").llm)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("way", ["directory", "dangling link"])
def test_what_is_in_the_place_of_a_file_is_named_or_replaced(run, way):
    run_dir = RunDir(run.path)
    path = run_dir.record_path("stage2")
    record = run_dir.read_record("stage2")
    break_file(path, way)
    assert run_dir.is_done("stage2")
    with pytest.raises(ArtifactError, match=r"summary\.json .*--force|summary\.json is missing"):
        run_dir.read_record("stage2")
    if way == "directory":
        with pytest.raises(ArtifactError, match=r"summary\.json: .*move the existing"):
            run_dir.write_record("stage2", record)
    run_dir.withdraw("stage2")
    assert not run_dir.is_done("stage2")
    run_dir.write_record("stage2", record)
    assert run_dir.read_record("stage2") == record


def test_a_damaged_report_does_not_become_part_of_a_card(run, tmp_path):
    report = run.step_dir("eval") / "report.md"
    report.parent.mkdir()
    report.write_text("# Report\n\nAUC 0.75\n")
    run.write_record("eval", {"fingerprint": {}, "files": hash_products(report.parent)})
    config = load_config(run.path / "config.yaml")
    export_model(config, run, tmp_path / "export", Licences("a", "b", "c"))
    report.write_text("# Report\n\nAUC 0.95\n")
    with pytest.raises(ArtifactError, match=r"report\.md is damaged"):
        export_model(config, run, tmp_path / "again", Licences("a", "b", "c"))
