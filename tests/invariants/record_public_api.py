"""Public API of the package: Python names, settings, exit codes, commands.

``python -m tests.invariants.record_public_api`` writes it to public_api.json, after a change that CHANGELOG.md names.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import collm_dist
from collm_dist import errors
from collm_dist.commands.console import SUBCOMMANDS
from collm_dist.config import Config
from collm_dist.config.loader import list_fields

PATH = Path(__file__).with_name("public_api.json")


def collect() -> dict[str, Any]:
    """Return the public API as JSON."""
    return {
        "python": {name: _describe(getattr(collm_dist, name)) for name in collm_dist.__all__},
        "settings": {name: re.sub(r" at 0x\w+", "", f"{field.annotation}") + f" = {_get_default(field)!r}"
                     for name, field in list_fields(Config)},
        "exit_codes": _list_exit_codes(),
        "subcommands": {name: _list_options(command.module) for name, command in SUBCOMMANDS.items()},
        "launch": sorted(path.name for path in (Path(__file__).parents[2] / "launch").glob("*.py")),
    }  # fmt: skip


def _get_default(field: Any) -> Any:
    return field.get_default(call_default_factory=True)


def _describe(value: Any) -> Any:
    """Return the signature of a function, or of a class and its public methods."""
    if not inspect.isclass(value):
        return str(inspect.signature(value))
    methods = {
        name: str(inspect.signature(member))
        for name, member in inspect.getmembers(value, inspect.isfunction)
        if not name.startswith("_")
    }
    return {"": str(inspect.signature(value)), **methods}


def _list_exit_codes() -> dict[str, int]:
    found = {
        name: error.exit_code
        for name, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, errors.CollmError) and error.__module__ == errors.__name__
    }
    return found | {"KeyboardInterrupt": errors.Interrupted.exit_code}


def _list_options(module: str) -> list[str]:
    """Return the options of a command and its positional arguments, without --help."""
    name = module if "." in module else f"collm_dist.commands.{module}"
    arguments, output = sys.argv, io.StringIO()
    sys.argv = ["command", "--help"]
    try:
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            importlib.import_module(name).main()
    finally:
        sys.argv = arguments
    sections = output.getvalue().split("\n\n")
    options = re.findall(r"(?<![\w-])--[a-z][\w-]+", sections[0])
    positional = next((section for section in sections if section.startswith("positional arguments:")), "")
    return sorted({*options, *re.findall(r"^  (\S+)", positional, re.M)})


def main() -> None:
    """Record the public API of today's code."""
    PATH.write_text(json.dumps(collect(), indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
