"""Export of a finished run: plain libraries load its parts, and an imported run gives the same scores."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import collm_dist
from collm_dist import RankingRequest
from collm_dist.config.loader import load_config
from collm_dist.errors import ArtifactError
from collm_dist.runs.atomic_files import compute_file_hash
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.licences import Licences
from tests.conftest import REPOSITORY

ITEMS = [str(number) for number in range(1, 41)]
REQUESTS = [
    RankingRequest("7", None, ITEMS),
    RankingRequest(None, ["3", "17", "40"], ITEMS),
    RankingRequest("nobody", None, ITEMS, as_of=1_010_000_000),
]


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    """Export made by the command."""
    folder = tmp_path_factory.mktemp("export") / "model"
    command = [sys.executable, "launch/export_model.py", "--config", str(finished_run / "config.yaml"),
               "--output", str(folder), "--license", "apache-2.0", "--data-license", "made up"]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith(str(folder))
    return folder


def test_the_same_scores_where_the_backbone_is_not_known(exported, finished_run, tiny_backbone_dir, tmp_path):
    scores = collm_dist.load_recommender(finished_run, device="cpu").score(REQUESTS)
    hidden = tiny_backbone_dir.rename(tiny_backbone_dir.with_name("hidden"))
    try:
        command = [sys.executable, "launch/import_model.py", "--input", exported, "--run-dir", tmp_path / "run"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        imported = collm_dist.load_recommender(tmp_path / "run", device="cpu")
        again = imported.score(REQUESTS)
    finally:
        hidden.rename(tiny_backbone_dir)
    assert imported.config.run.dir == str(tmp_path / "run")
    np.testing.assert_array_equal(again, scores)


def test_plain_libraries_load_its_parts(exported, tiny_backbone_dir):
    merged = AutoModelForCausalLM.from_pretrained(exported / "model")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_backbone_dir), exported / "adapter")
    tokens = AutoTokenizer.from_pretrained(exported / "model")("Liked: something", return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs = merged(tokens).logits, adapted(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_backbone_dir)(tokens).logits
    assert (ours - theirs).abs().max() < 1e-5  # measured: 5e-7
    assert (ours - plain).abs().max() > 1e-3
    assert not (exported / "adapter" / "adapter_model.bin").exists()


def test_the_card_has_data_metrics_baselines_and_licences(exported, finished_run):
    card = (exported / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\nbase_model: ')
    assert "| training data (`data/` has its ids, titles and events) | made up |" in card
    assert "60 users, 80 items, explicit feedback" in card
    for row in json.loads((finished_run / "eval" / "report.json").read_text())["rows"]:
        if (row["split"], row["slice"]) == ("test", "all") and row["model"] in ("stage2", "as_of_logistic"):
            assert f"{row['auc']:.4f} [{row['auc_low']:.4f}, {row['auc_high']:.4f}]" in card
    assert "![" not in card


@pytest.mark.parametrize("way", ["flipped", "missing", "link", "outside", "other version", "no index"])
def test_damaged_exports_leave_nothing_behind(exported, tmp_path, way):
    folder, run_dir = tmp_path / "export", RunDir(tmp_path / "run")
    shutil.copytree(exported, folder)
    path, index = folder / "mapping.safetensors", json.loads((folder / "export.json").read_text())
    if way == "flipped":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif way == "missing":
        path.unlink()
    elif way == "link":
        path.unlink()
        path.symlink_to(exported / "mapping.safetensors")
    elif way == "outside":
        (tmp_path / "secret").write_text("x")
        index["files"]["cf/../../secret"] = compute_file_hash(tmp_path / "secret")
    elif way == "other version":
        index["format_version"] = 99
    (folder / "export.json").write_text(json.dumps(index))
    if way == "no index":
        (folder / "export.json").unlink()
    with pytest.raises(ArtifactError):
        import_model(folder, run_dir)
    assert not run_dir.path.exists()


def test_what_is_there_stays(exported, finished_run, tmp_path):
    config = load_config(finished_run / "config.yaml")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    for act in (
        lambda: export_model(config, RunDir(finished_run), tmp_path / "mine", Licences("a", "b", "c")),
        lambda: import_model(exported, RunDir(tmp_path / "mine")),
    ):
        with pytest.raises(ArtifactError, match="mine exists already"):
            act()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
