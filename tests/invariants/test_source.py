"""Source rules: sizes, names and forbidden text."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("collm_dist", "launch", "tests", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SOURCE = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LAUNCH_LINES = 400, 80, 60
# Homes, temporary and mounted folders of somebody's machine.
MACHINE_PATH = re.compile(r"(?<![\w.{}~])/(?:home|root|Users|work|opt|mnt|tmp|scratch)/\w")
TEXT_SUFFIXES = {".py", ".yaml", ".md", ".toml", ".txt", ".json", ".sh", ""}


def list_tracked() -> list[Path]:
    """Return the files under version control, or all, where this is an unpacked archive."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path):
    text = path.read_text(encoding="utf-8")
    most = MAX_LAUNCH_LINES if path.parent.name == "launch" else MAX_FILE_LINES
    assert len(text.splitlines()) <= most
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_no_catch_all_modules_and_no_notes_to_self():
    for path in FILES:
        assert path.stem not in {"utils", "helpers", "misc", "common"}, path
    for path in SOURCE:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(?:TODO|FIXME|XXX|HACK)\b|raise NotImplementedError", text), path


def test_launch_names_shadow_no_package():
    """The folder of a script becomes sys.path[0], so launch/evaluate.py would stand before the package evaluate."""
    for path in (ROOT / "launch").glob("*.py"):
        assert "_" in path.stem or path.stem in ("train", "serve", "search"), (
            f"{path.name}: one word is likely somebody's package"
        )
        found = importlib.util.find_spec(path.stem)
        assert found is None or Path(found.origin).parent == path.parent, f"{path.name} shadows {found.origin}"


def test_benchmarks_run_as_they_say():
    """``python -m benchmarks.x`` from the repository root: what imports its neighbours cannot run as a path."""
    folder = ROOT / "benchmarks"
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert f"python benchmarks/{path.name}" not in text, path
        imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert not any((folder / f"{name}.py").exists() for name in imported), path


def test_scripts_do_nothing_when_imported():
    for path in SOURCE:
        if path.parts[-2] not in ("launch", "benchmarks"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            function = ast.FunctionDef | ast.AsyncFunctionDef
            simple = ast.Import | ast.ImportFrom | function | ast.ClassDef | ast.Assign | ast.AnnAssign
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            assert isinstance(node, simple) or docstring or guard, f"{path.name}:{node.lineno}"


def test_no_path_of_a_machine():
    for path in list_tracked():
        if path.suffix in TEXT_SUFFIXES and path.name != "LICENSE":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                assert not MACHINE_PATH.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


HEAVY = {"torch", "ray", "transformers", "deepspeed", "matplotlib", "sklearn"}


def list_loaded_modules(code):
    """Return the names of the modules that Python code loads; the code may print other lines first."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return set(done.stdout.splitlines()[-1].split())


def test_a_finished_run_is_recognised_without_heavy_libraries():
    assert not HEAVY & list_loaded_modules("import collm_dist.cli, collm_dist.orchestration.pipeline")


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.py")))
def test_help_comes_without_heavy_libraries(script):
    code = f"""
import contextlib, os, runpy
os._exit = sys.exit  # so that the modules can be listed afterwards
sys.argv = ["launch/{script}", "--help"]
with contextlib.suppress(SystemExit):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
    loaded = list_loaded_modules(code)
    assert "argparse" in loaded
    assert not HEAVY & loaded
