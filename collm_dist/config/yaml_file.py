"""Reading YAML the way people mean it.

PyYAML follows YAML 1.1, where ``1e-4`` is text, ``yes``, ``no``, ``on`` and ``off`` are booleans (also as keys),
``12:30`` is a number and a date is no text. Here the plain scalars are those of YAML 1.2: null, true, false, integers,
floats and text. A key given twice is a mistake. Aliases are spelled out, so that changing one place changes no other;
how large a file may become by that is bounded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from collm_dist.errors import ConfigError

MAX_BYTES = 1 << 18
# With aliases spelled out: ten lines of aliases of aliases are a billion values.
MAX_VALUES = 100_000
# What no file name and no prompt can hold.
_UNUSABLE = re.compile(r"[\x00\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2 scalars that refuses keys given twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own shape

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return a node's value; PyYAML lets Python's own errors through where a value is not what its tag says."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, IndexError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"the value is no {kind}", node.start_mark) from None

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Return a scalar's text."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and _UNUSABLE.search(value):
            problem = "a NUL character or half a surrogate pair in a text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value


_NUMBER_STARTS = list("-+.0123456789")
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", _NUMBER_STARTS),
    ("float", r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)", _NUMBER_STARTS),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that is something else in YAML 1.2, too: ``1e5`` is a number there."""


for _character, _resolvers in _Loader.yaml_implicit_resolvers.items():
    for _full_tag, _regex in _resolvers:
        _Dumper.add_implicit_resolver(_full_tag, _regex, [_character])


def dump_yaml(value: Any) -> str:
    """Return the YAML text that ``parse_yaml`` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue  # PyYAML refuses these itself
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
        yaml.YAMLError: it is no YAML, is nested too deeply, or grows beyond ``MAX_VALUES`` by its aliases.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return _copy(loader.construct_document(node))
    except RecursionError:
        raise yaml.YAMLError("lists or mappings are nested too deeply") from None
    except ValueError as error:  # an escape that is no character
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=loader.get_mark()) from None
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counted: dict[int, int | None]) -> int:
    """Return the number of values below a node with aliases spelled out.

    Args:
        node: where to start.
        counted: by the nodes' identities; None = a node that is being counted.
    """
    known = counted.get(id(node), 0)
    if known is None:
        raise yaml.MarkedYAMLError(problem="an alias of what it stands in", problem_mark=node.start_mark)
    if known:
        return known
    counted[id(node)] = None
    total = 1
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for one in child if isinstance(child, tuple) else (child,):
            total += _count_values(one, counted)
    if total > MAX_VALUES:
        problem = f"more than {MAX_VALUES:,} values, with its aliases spelled out"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    counted[id(node)] = total
    return total


def _copy(value: Any) -> Any:
    """Return a value in which no two places share a list or a mapping, as an alias and its anchor do."""
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    return [_copy(one) for one in value] if isinstance(value, list) else value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: there is no such file, or it is no YAML mapping; the message has file and line.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"--config: '{path}' has more than {MAX_BYTES >> 10} KiB: it is no configuration")
        document = parse_yaml(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"--config: there is no file '{path}' (relative to {Path.cwd()})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: '{path}' is no UTF-8 text ({error}); save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config: {str(path)!r} cannot be read: {error}") from None
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
