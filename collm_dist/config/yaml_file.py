"""Reading YAML the way people mean it.

PyYAML follows YAML 1.1, where ``1e-4`` is text, ``yes``, ``no``, ``on`` and ``off`` are booleans (also as keys),
``12:30`` is a number and a date is no text. Here the plain scalars are those of YAML 1.2: null, true, false, integers,
floats and text. A key given twice is a mistake.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from collm_dist.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2 scalars that refuses keys given twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own shape


_NUMBER_STARTS = list("-+.0123456789")
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", _NUMBER_STARTS),
    ("float", r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)", _NUMBER_STARTS),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key}' is given twice, first in line {seen[key]}", key_node.start_mark
            )
        seen[key] = line
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: there is no such file, or it is no YAML mapping; the message has file and line.
    """
    try:
        document = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"--config: there is no file '{path}' (relative to {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: '{path}' cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, error.problem or str(error)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: {problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected sections such as 'run:' and 'dataset:', found {type(document).__name__}")
    return document


def parse_value(text: str) -> Any:
    """Return the value of an override: a number, true, false, null, a [list] or {mapping}, else the text as it is.

    Raises:
        yaml.YAMLError: a list, a mapping or a quoted text is not closed.
    """
    if text.lstrip().startswith(("[", "{", '"', "'")):
        return parse_yaml(text)
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    # A colon or a hash in a prompt given on the command line is part of it.
    return text if isinstance(value, (str, dict, list)) else value
