"""Commands of launch/ run in this process, and their output with placeholders for folders."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from collm_dist.config.loader import load_config

ROOT = Path(__file__).parents[2]


@contextmanager
def environment_kept():
    """Take back what a command leaves in the environment; a process group of one may stay."""
    before, arguments = dict(os.environ), sys.argv
    try:
        yield
    finally:
        sys.argv = arguments
        for name in set(os.environ) - set(before):
            del os.environ[name]


def run_script(script: str, *arguments: str) -> tuple[int, str, str]:
    """Run a script of launch/ and return its exit code, output and errors."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "launch" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    output, errors = io.StringIO(), io.StringIO()
    with environment_kept(), redirect_stdout(output), redirect_stderr(errors):
        sys.argv = [script, *arguments]
        code = module.main()
    return code, output.getvalue(), errors.getvalue()


def list_places(run: Path) -> dict[str, str]:
    """Return the folders of a run, and what stands for them in records."""
    config = load_config(run / "config.yaml")
    data = Path(config.dataset.path).parent
    return {str(run): "<run>", str(data): "<data>", config.llm.backbone: "<backbone>"}


def replace_paths(value: Any, places: dict[str, str]) -> Any:
    """Return a JSON value with placeholders for folders, in keys and in texts."""
    if isinstance(value, str):
        for path, placeholder in places.items():
            value = value.replace(path, placeholder)
        return value
    if isinstance(value, dict):
        return {replace_paths(key, places): replace_paths(entry, places) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [replace_paths(entry, places) for entry in value]
    return value


def show_plans(run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the dry runs of a run's commands print, line by line."""
    plans = {}
    for script in ("train", "run_pipeline"):
        code, output, _ = run_script(script, "--config", str(run / "config.yaml"), "--dry-run", *overrides)
        lines = replace_paths(output, list_places(run)).splitlines()
        lines = [re.sub(r"about .*(?= on this CPU)|\S+ GFLOP/s on \d+", "<measured>", line) for line in lines]
        plans[script] = {"exit_code": code, "lines": lines}
    # Both begin with all settings, after a comment on those that follow from others.
    first, second = plans["train"]["lines"], plans["run_pipeline"]["lines"]
    shared = next(place for place, line in enumerate(first) if place and line.startswith("# "))
    assert first[:shared] == second[:shared]
    plans["train"]["lines"] = first[shared:]
    return plans
