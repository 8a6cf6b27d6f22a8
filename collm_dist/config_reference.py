"""The reference of all settings, made from their own descriptions: ``python -m collm_dist.config_reference [FILE]``."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from collm_dist.artifacts import open_atomic
from collm_dist.config import Config
from collm_dist.config_io import get_section

_BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
_HEAD = """# Settings

One YAML file is one experiment. What it does not say has the default given here; `section.key=value` on the command
line wins over the file. A wrong name or value is refused before any work, with the nearest right one. Numbers may be
written `1e-4`, and `yes` and `no` are text.

Settings marked with * say how the work is done, not what comes out: changing one leaves finished steps as they are.

*This file is made by `python -m collm_dist.config_reference configs/README.md`; do not edit it.*

| config | what it is |
|---|---|
"""


def render_reference(configs: Path) -> str:
    """Return the reference as Markdown, with the experiments of a folder by the first comment of each."""
    lines = [_HEAD.rstrip()]
    for path in sorted(configs.glob("*.yaml")):
        lines.append(f"| `{path.name}` | {_read_first_sentence(path)} |")
    for name, field in Config.model_fields.items():
        section = get_section(field.annotation)
        assert section is not None
        lines += ["", f"## {name}", "", _cell((section.__doc__ or "").strip().split("\n\n")[0]), ""]
        lines += ["| setting | default | meaning |", "|---|---|---|", *_render_fields(section, f"{name}.")]
    return "\n".join(lines) + "\n"


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
        return _cell(f"`[{', '.join(str(one) for one in default)}]`")
    if isinstance(default, str):
        return _cell(f'`"{default}"`' if default != default.strip() or not default else f"`{default}`")
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _describe_type(field: FieldInfo) -> str:
    bounds = [f"{sign} {getattr(one, name):g}" for one in field.metadata for kind, (sign, name) in _BOUNDS.items()
              if isinstance(one, kind)]  # fmt: skip
    return " ".join([_name_type(field.annotation), " and ".join(bounds)]).strip()


def _name_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _name_type(arguments[0])
    if origin is Literal:
        return " | ".join(str(one) for one in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_name_type(one) for one in arguments)
    if origin is tuple:
        inner = [one for one in arguments if one is not Ellipsis]
        return f"list of {_name_type(inner[0])}" if Ellipsis in arguments else f"{len(inner)} x {_name_type(inner[0])}"
    if origin is dict:
        return "mapping"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "none"}
    return names.get(annotation, str(annotation))


def _cell(text: str) -> str:
    """Text that a Markdown table takes as one cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def main(arguments: list[str] | None = None) -> int:
    """Write the reference beside the configs that it lists, or print it."""
    paths = sys.argv[1:] if arguments is None else arguments
    text = render_reference(Path(paths[0]).parent if paths else Path("configs"))
    if paths:
        with open_atomic(Path(paths[0])) as file:
            file.write(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
