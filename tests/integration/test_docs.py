"""README and documentation pages: commands run, settings exist, links resolve, the site builds."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.errors import CollmError
from tests.doc_blocks import (
    NEEDS,
    ROOT,
    list_anchors,
    list_commands,
    list_page_commands,
    list_pages,
    read_blocks,
    strip_blocks,
)
from tests.integration.docs_folder import prepare_folder, run_block
from tests.integration.test_screenshots import load_script

PAGES = list_pages()
SCRIPTS = sorted((ROOT / "launch").glob("*.py"))
LANGUAGES = {"bash", "python", "yaml", "json", "csv", "text", "dockerfile", "ini", "toml"}
# Stands in for configurations that only the reader has.
STAND_IN = ROOT / "configs" / "own_ratings.yaml"
# Base for fragments of configurations.
PLAIN = ROOT / "configs" / "tiny_cpu.yaml"
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND_LINE = re.compile(r" {4,}(?:python|deepspeed|torchrun|make|ray|pip|curl|docker|kubectl|sbatch)\b")
OUTSIDE = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*>""")

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@by_page
def test_every_fence_says_what_it_is(page):
    for block in read_blocks(page):
        assert block.language in LANGUAGES, f"{block.place}: '{block.language}' is none of {', '.join(LANGUAGES)}"
        assert block.needs in (None, *NEEDS), f"{block.place}: needs '{block.needs}', not one of {', '.join(NEEDS)}"


@by_page
def test_no_command_hides_from_the_tests(page):
    for number, line in strip_blocks(page):
        assert not COMMAND_LINE.match(line), f"{page.name}:{number}: put this command into a bash fence: {line.strip()}"


@by_page
def test_bash_parses(page):
    for block in read_blocks(page):
        if block.language == "bash":
            checked = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True)
            assert checked.returncode == 0, f"{block.place}: {checked.stderr}\n{block.text}"


@by_page
def test_commands_name_what_is_there(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in list_page_commands(page):
        check_command(command, f"{page.name}:{command.line}")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_teaches_by_commands_that_are_right(script, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    assert module.main() == 0
    printed = capsys.readouterr().out
    examples = re.findall(r"^  ((?:python|deepspeed|torchrun|ray) (?:.*\\\n)*.*)", printed, re.MULTILINE)
    assert any(script.name in example for example in examples), printed
    for command in (command for text in examples for command in list_commands(text)):
        check_command(command, f"{script.name} --help")


def check_command(command, place):
    """Assert that a command's scripts, modules, Makefile targets and settings exist."""
    for program in command.programs:
        is_module = program.startswith("-m ")
        found = importlib.util.find_spec(program[3:]) if is_module else (ROOT / program).is_file()
        assert found, f"{place}: there is no {program}"
    if command.words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        missing = {word for word in command.words[1:] if "=" not in word and not word.startswith("-")} - targets
        assert not missing, f"{place}: the Makefile has no target {', '.join(missing)}"
    given = Path(command.config or STAND_IN)
    try:
        load_config(
            given if given.parts[0] == "configs" else STAND_IN,
            [override.replace("$PWD", str(ROOT)) for override in command.overrides],
        )
    except CollmError as error:
        pytest.fail(f"{place}: {' '.join(command.words)}\n{error}")


@by_page
def test_settings_in_yaml_exist(page, tmp_path):
    for number, block in enumerate(read_blocks(page)):
        if block.language != "yaml":
            continue
        documents = [document for document in yaml.safe_load_all(block.text) if document is not None]
        for document in documents:
            if not isinstance(document, dict) or not document.keys() <= Config.model_fields.keys():
                continue
            whole = yaml.safe_load(PLAIN.read_text(encoding="utf-8"))
            for name, section in document.items():
                whole[name] = {**whole.get(name, {}), **(section or {})}
            path = tmp_path / f"{number}.yaml"
            path.write_text(yaml.safe_dump(whole), encoding="utf-8")
            try:
                load_config(path)
            except CollmError as error:
                pytest.fail(f"{block.place}: {error}\n{block.text}")


@by_page
def test_links_between_pages_lead_somewhere(page):
    for number, line in strip_blocks(page):
        for link in LINK.findall(line):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}:{number}: there is no {link}"
            if anchor:
                assert anchor in list_anchors(target), f"{page.name}:{number}: {target.name} has no heading '{anchor}'"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Site built as by `make docs`."""
    pytest.importorskip("material", reason="needs the optional dependencies 'docs'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_page_and_every_setting(site):
    names = {"index.html"} | {f"{page.stem}.html" for page in PAGES[1:]}
    assert names <= {path.name for path in site.glob("*.html")}
    reference = (site / "configuration.html").read_text(encoding="utf-8")
    assert "stage1.max_tokens_per_micro_batch" in reference
    assert "cluster.deepspeed_extra" in reference


def test_the_site_asks_nobody_else_for_anything(site):
    for path in site.rglob("*.html"):
        found = OUTSIDE.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(site)}: {found[0]}"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path.name


def test_the_search_works_from_a_folder(site):
    with load_script().open_browser() as window:
        window.get((site / "index.html").as_uri())
        window.execute_script("document.querySelector('[data-md-toggle=search]').click()")
        window.find_element("css selector", "[data-md-component=search-query]").send_keys("early_stop_patience")
        deadline, found = time.monotonic() + 60, []
        while not found and time.monotonic() < deadline:
            time.sleep(0.2)
            found = window.find_elements("css selector", ".md-search-result__link")
        assert "recipes.html" in " ".join(link.get_attribute("href") for link in found)
        assert window.get_log("browser") == []


def test_figures_are_drawn_and_shown(tmp_path):
    command = [sys.executable, "docs/figures.py", str(tmp_path)]
    drawn = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert drawn.returncode == 0, drawn.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {path.name for path in (ROOT / "docs" / "images").iterdir()}, "run: python docs/figures.py"
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"images/{name}" in text for name in names)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_backbone_dir):
    """Prepared folder with the run that README's commands make from ratings.csv."""
    folder = prepare_folder(tmp_path_factory.mktemp("docs") / "folder", tiny_backbone_dir)
    made = next(block for block in read_blocks(ROOT / "README.md") if block.runs and "run_pipeline.py" in block.text)
    run_block(made, folder)
    assert (folder / "runs" / "mine" / "eval" / "report.json").exists()
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@by_page
def test_what_a_page_shows_runs(page, prepared, tmp_path):
    """Run all blocks of a page in order, in a folder with a finished run."""
    blocks = [block for block in read_blocks(page) if block.runs]
    if not blocks:
        pytest.skip("nothing to run")
    folder = tmp_path / "folder"
    shutil.copytree(prepared, folder, symlinks=True)
    for block in blocks:
        run_block(block, folder)
