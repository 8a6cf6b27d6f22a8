"""The installed wheel, used from an empty folder without a checkout."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml

from collm_dist.serving.web_page import FILES
from tests.conftest import write_items, write_ratings

SUBCOMMANDS = [
    "run", "preprocess", "pretrain", "train", "evaluate", "rank", "serve", "search", "export", "import", "forget",
    "convert", "assets", "settings",
]  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory, repository):
    """Folder with the files of the wheel only."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = folder / "source"  # a build in the checkout would leave files there and use those of earlier builds
    shutil.copytree(repository / "collm_dist", source / "collm_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("collm_dist-*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, capture_output=True)
    return target


@pytest.fixture
def collm_dist(installed, tmp_path):
    """Run the installed command in an empty folder."""

    def run(*arguments):
        # -P: do not prepend the script's folder to sys.path.
        command = [sys.executable, "-P", str(installed / "bin" / "collm-dist"), *arguments]
        environment = os.environ | {"PYTHONPATH": str(installed)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return run


def test_help_lists_the_subcommands_in_the_order_of_the_data(collm_dist):
    printed = collm_dist("--help").stdout
    listed = [line.split()[0] for line in printed.splitlines() if line.startswith("  ") and not line.startswith("  -")]
    assert listed == SUBCOMMANDS
    assert collm_dist("--version").stdout.startswith("collm-dist 0.")
    assert "usage: collm-dist train" in collm_dist("train", "--help").stdout
    refused = collm_dist("trian")
    assert refused.returncode == 2
    assert "invalid choice: 'trian'" in refused.stderr


def test_it_is_typed_and_ships_prompts_recipes_and_the_page(installed):
    package = installed / "collm_dist"
    assert (package / "py.typed").exists()
    assert (package / "data" / "prompts" / "texts" / "question_last" / "stage2.txt").exists()
    assert (package / "evaluation" / "recipes" / "paper_ml1m_mf.yaml").exists()
    assert {path.name for path in (package / "serving" / "page").iterdir()} == {name for name, _ in FILES.values()}


@pytest.fixture
def own_config(tmp_path, tiny_backbone_dir, repository):
    """A config file with its data, in the folder where the command runs."""
    write_ratings(tmp_path / "ratings.csv")
    write_items(tmp_path / "items.csv")
    settings = yaml.safe_load((repository / "configs" / "tiny_cpu.yaml").read_text(encoding="utf-8"))
    settings["dataset"] |= {"path": "ratings.csv", "items_path": "items.csv"}
    settings["llm"]["backbone"] = str(tiny_backbone_dir)
    settings["prompt"] = {"history_length": 3, "max_title_tokens": 12, "stage2": "configs/prompts/stage2_pair.txt"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return "own.yaml"


def test_a_pipeline_is_planned_from_an_empty_folder(collm_dist, own_config):
    planned = collm_dist("run", "--config", own_config, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "stage2" in planned.stdout


@pytest.mark.slow
def test_a_pipeline_runs_from_an_empty_folder(collm_dist, own_config, tmp_path):
    done = collm_dist("run", "--config", own_config)
    assert done.returncode == 0, done.stdout + done.stderr
    report = tmp_path / "runs" / "tiny" / "eval" / "report.md"
    written = report.stat().st_mtime_ns
    # Two processes through the deepspeed launcher, and their error.
    again = collm_dist("evaluate", "--config", own_config, "--force", "eval", "cluster.num_processes=2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert report.stat().st_mtime_ns > written
    refused = collm_dist("train", "cluster.num_processes=2", "--config", own_config, "--stage", "1", "lora.rank=5")
    assert refused.returncode == 2
    assert "lora.rank" in refused.stderr
