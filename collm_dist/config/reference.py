"""The reference of all settings, made from their own descriptions: ``python -m collm_dist.config.reference [FILE]``."""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from collm_dist.config import Config
from collm_dist.config.loader import get_section
from collm_dist.runs.atomic_files import open_atomic

_BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
_HEAD = """# Settings

One YAML file is one experiment. Settings that it leaves out have the defaults given here; `section.key=value` on the
command line overrides the file. A wrong name or value is refused before any work, with the nearest valid one. Numbers
may be written `1e-4`; `yes` and `no` are strings.

A file that changes a few settings of another one names it, relative to its own folder: `base: ml1m_official.yaml`.
Mappings are merged key by key; lists and other values replace those of the base.

Settings marked with * say how the work is done, not what comes out: changing one leaves finished steps as they are.

*This file is made by `python -m collm_dist.config.reference configs/README.md`; do not edit it.*

"""


def render_reference(configs: Path) -> str:
    """Return the reference as Markdown: head, the experiments of a folder, all settings."""
    return f"{_HEAD}{render_experiments(configs)}\n{render_settings()}"


def render_experiments(configs: Path) -> str:
    """Return a table of a folder's experiments by the first comment of each."""
    lines = ["| config | what it is |", "|---|---|"]
    lines += [f"| `{path.name}` | {_read_first_sentence(path)} |" for path in sorted(configs.glob("*.yaml"))]
    return "\n".join(lines) + "\n"


def render_settings() -> str:
    """Return a heading and a table for each section."""
    parts: list[str] = []
    for name, field in Config.model_fields.items():
        section = get_section(field.annotation)
        assert section is not None
        about = _cell((section.__doc__ or "").strip().split("\n\n")[0])
        head = [f"## {name}", "", about, "", "| setting | default | meaning |", "|---|---|---|"]
        parts.append("\n".join([*head, *_render_fields(section, f"{name}.")]) + "\n")
    return "\n".join(parts)


def _read_first_sentence(path: Path) -> str:
    comments: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.lstrip("# "))
    return " ".join(comments).split(". ")[0].rstrip(".")


def _render_fields(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = get_section(field.annotation)
        if inner is not None:
            yield from _render_fields(inner, f"{prefix}{name}.")
            continue
        extra = field.json_schema_extra
        mark = "*" if isinstance(extra, dict) and extra.get("operational") else ""
        allowed = _describe_type(field)
        meaning = f"{field.description or ''} ({allowed})"
        yield f"| `{prefix}{name}`{mark} | {_describe_default(field)} | {_cell(meaning)} |"


def _describe_default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return _cell(f"`[{', '.join(str(value) for value in default)}]`")
    if isinstance(default, str):
        return _cell(f'`"{default}"`' if default != default.strip() or not default else f"`{default}`")
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _describe_type(field: FieldInfo) -> str:
    return f"{_name_type(field.annotation)} {_name_bounds(field.metadata)}".strip()


def _name_bounds(metadata: Sequence[Any]) -> str:
    return " and ".join(
        f"{sign} {getattr(bound, name):g}"
        for bound in metadata
        for kind, (sign, name) in _BOUNDS.items()
        if isinstance(bound, kind)
    )


def _name_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _name_type(arguments[0])
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_name_type(member) for member in arguments)
    if origin is tuple:
        name = _name_type(arguments[0])
        return f"list of {name}" if Ellipsis in arguments else f"{len(arguments)} x {name}"
    if origin is dict:
        return "mapping"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "none"}
    return names.get(annotation, str(annotation))


def _cell(text: str) -> str:
    """Text that a Markdown table takes as one cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    """Write the reference beside the configs that it lists, or print it."""
    parser = argparse.ArgumentParser(prog="python -m collm_dist.config.reference", description="List all settings.")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="beside the configs; default: print it")
    path = parser.parse_args().file
    text = render_reference(path.parent if path else Path("configs"))
    if path:
        with open_atomic(path) as file:
            file.write(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
