"""Runs of other authors that name code: it runs only if the caller says so."""

import json
import shutil
import subprocess
import sys

import pytest

from collm_dist import load_recommender
from collm_dist.cf.model_files import load_model
from collm_dist.config.loader import dump_config, load_config
from collm_dist.errors import ArtifactError
from collm_dist.runs.atomic_files import compute_file_hash
from collm_dist.runs.code_trust import keep_trust, read_model_name
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.licences import Licences
from tests.conftest import REPOSITORY
from tests.golden.make_run import ASSET

CODE = """from pathlib import Path
from transformers import LlamaForCausalLM
Path(r"{marker}").touch()
class Foreign(LlamaForCausalLM):
    pass
"""
CF_CODE = """from pathlib import Path
from collm_dist.cf.models.mf import MatrixFactorization
Path(r"{marker}").touch()
class Foreign(MatrixFactorization):
    pass
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder, a module cache of transformers and a working directory of this test."""
    monkeypatch.setenv("COLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path):
    """A finished stage 1, made by release 0.1."""
    return RunDir(shutil.copytree(ASSET / "run", tmp_path / "run"))


def write_backbone_code(run, marker):
    """Make the merged backbone a class of a file in its folder, and allow it in the run's own settings."""
    merged = run.step_dir("stage1") / "merged"
    (merged / "foreign.py").write_text(CODE.format(marker=marker))
    config = json.loads((merged / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "foreign.Foreign"}
    config["model_type"] = "llama"
    (merged / "config.json").write_text(json.dumps(config))
    path = run.path / "config.yaml"
    path.write_text(path.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    record = run.read_record("stage1")
    record["fingerprint"]["config.llm.trust_remote_code"] = True
    run.record_path("stage1").write_text(json.dumps(record))


def write_cf_code(run, marker, in_config):
    """Name a module of the working directory in the header of the collaborative model, and in the settings."""
    (run.path.parent / "foreign_cf.py").write_text(CF_CODE.format(marker=marker))
    path = run.step_dir("cf") / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["model"] = json.dumps("foreign_cf:Foreign")
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    if in_config:
        path = run.path / "config.yaml"
        path.write_text(path.read_text().replace("\n  model: mf\n", '\n  model: "foreign_cf:Foreign"\n', 1))
        assert load_config(path).cf.model == "foreign_cf:Foreign"


@pytest.mark.parametrize("kind", ["backbone", "cf", "cf header"])
def test_a_received_run_runs_its_code_only_if_asked(run, tmp_path, kind):
    marker = tmp_path / "marker"
    if kind == "backbone":
        write_backbone_code(run, marker)
        expected = r"config\.yaml: llm\.trust_remote_code: true(.|\n)*--trust-remote-code"
    else:
        write_cf_code(run, marker, in_config=kind == "cf")
        expected = r"model\.safetensors: model: foreign_cf:Foreign(.|\n)*--trust-remote-code"
    with pytest.raises(ArtifactError, match=expected):
        load_recommender(run.path, "cpu", accept_stage1=True)
    assert not marker.exists()
    try:
        load_recommender(run.path, "cpu", trust_code=True, accept_stage1=True)
    finally:
        sys.modules.pop("foreign_cf", None)
    assert marker.exists()


def test_a_run_that_was_trained_here_needs_no_flag_until_its_record_changes(run, tmp_path):
    write_backbone_code(run, tmp_path / "marker")
    config = load_config(run.path / "config.yaml")
    for step in ("cf", "stage1"):
        keep_trust(config, run, step)
    load_recommender(run.path, "cpu", accept_stage1=True)
    moved = RunDir(run.path.rename(tmp_path / "moved"))
    load_recommender(moved.path, "cpu", accept_stage1=True)
    record = moved.read_record("stage1") | {"global_steps": 1}
    moved.record_path("stage1").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="--trust-remote-code"):
        load_recommender(moved.path, "cpu", accept_stage1=True)


def test_nothing_is_kept_of_runs_without_code(run, tmp_path):
    keep_trust(load_config(run.path / "config.yaml"), run, "stage1")
    assert not (tmp_path / "cache").exists()
    assert read_model_name(run.step_dir("cf") / "model.safetensors") == "mf"
    assert read_model_name(run.path / "config.yaml") == ""
    assert load_model(run.step_dir("cf") / "model.safetensors")[0].model == "mf"


def test_an_export_with_code_is_imported_with_the_flag_alone(run, tmp_path):
    export = export_model(load_config(run.path / "config.yaml"), run, tmp_path / "export", Licences("a", "b", "c"))
    (export / "model" / "foreign.py").write_text(CODE.format(marker=tmp_path / "marker"))
    config = load_config(export / "config.yaml")
    config = config.model_copy(update={"llm": config.llm.model_copy(update={"trust_remote_code": True})})
    (export / "config.yaml").write_text(dump_config(config))
    record = json.loads((export / "records" / "stage1.json").read_text())
    record["fingerprint"]["config.llm.trust_remote_code"] = True
    del record["record_hash"]
    (export / "records" / "stage1.json").write_text(json.dumps(record))
    index = json.loads((export / "export.json").read_text())
    for name in [*index["files"], "model/foreign.py"]:
        index["files"][name] = compute_file_hash(export / name)
    (export / "export.json").write_text(json.dumps(index))
    command = [sys.executable, REPOSITORY / "launch/import_model.py", "--input", export, "--run-dir", tmp_path / "got"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "config.yaml: llm.trust_remote_code: true" in done.stderr
    assert "--trust-remote-code" in done.stderr
    assert not (tmp_path / "got").exists()
    imported = import_model(export, RunDir(tmp_path / "got"), trust_code=True)
    load_recommender(imported.path, "cpu", accept_stage1=True)
