"""YAML 1.2 documents of settings.

Plain scalars follow the JSON schema of YAML 1.2, plus ``~`` for null: ``1e-4`` is a number; ``yes``, ``off``,
``12:30``, ``007`` and dates are strings. Aliases become copies, so that an override of one setting never changes
another.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StringMark, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

# Counted with aliases expanded: ten lines of aliases of aliases are a billion values.
MAX_VALUES = 100_000

# Characters that neither a file name nor a prompt can hold.
_UNUSABLE = re.compile(r"[\x00\ud800-\udfff]")
_UNICODE_BREAKS = re.compile("[\x85\u2028\u2029]")
_TAG_PREFIX = "tag:yaml.org,2002:"
_PLAIN_SCALARS = [
    (f"{_TAG_PREFIX}{name}", re.compile(f"(?:{pattern})$"))
    for name, pattern in (
        ("null", r"~|null|"),
        ("bool", r"true|false"),
        ("int", r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)"),
        ("float", r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)"),
        ("merge", r"<<"),
    )
]
_CONVERSIONS: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": {"true": True, "false": False}.__getitem__,
    "int": int,
    "float": lambda text: float(text.replace(".inf", "inf")),
    "str": str,
}


class _Resolver(VersionedResolver):
    """Types of plain scalars, tried in order, whatever their first character."""

    @property
    def versioned_resolver(self) -> dict[str | None, list[tuple[str, re.Pattern[str]]]]:
        """Return tags and patterns by a scalar's first character; None stands for any."""
        return {None: _PLAIN_SCALARS}


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        YAMLError: the text is not one YAML document, repeats a key, has an unknown tag, is nested too deeply, or holds
            more than ``MAX_VALUES`` values with its aliases expanded.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _Resolver
    try:
        node = yaml.compose(text)
        return None if node is None else _Builder().build(node, node.start_mark)
    except RecursionError:
        raise YAMLError("lists or mappings are nested too deeply") from None
    except ValueError:  # chr() of an escape
        raise YAMLError("an escape such as \\U00110000 is beyond the last Unicode character") from None


def parse_value(text: str) -> Any:
    """Return the value of an override: a number, true, false, null, a [list] or {mapping}, else the string itself.

    Raises:
        YAMLError: a list, a mapping or a quoted string is malformed.
    """
    if text.lstrip().startswith(("[", "{", '"', "'")):
        return parse_yaml(text)
    try:
        value = parse_yaml(text)
    except YAMLError:
        return text
    # A colon or a hash in a prompt given on the command line is part of it.
    return text if isinstance(value, (str, dict, list)) else value


def dump_yaml(document: dict[str, Any]) -> str:
    """Return the YAML text of a mapping, which ``parse_yaml`` reads back equal."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    # Quotes what YAML 1.1 takes for a boolean or a time, so that other readers find the same strings.
    yaml.version = (1, 1)
    yaml.default_flow_style, yaml.width = False, 120
    yaml.representer.sort_base_mapping_type_on_output = False
    stream = StringIO()
    yaml.dump(document, stream)
    return stream.getvalue().removeprefix("%YAML 1.1\n---\n")


class _Representer(SafeRepresenter):
    """Nodes without aliases, in which the line breaks of Unicode are escaped: a reader would fold them."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: equal objects are written out each."""
        return True

    def represent_str(self, data: str) -> ScalarNode:
        """Return the node of a string."""
        style = '"' if _UNICODE_BREAKS.search(data) else None
        return self.represent_scalar(f"{_TAG_PREFIX}str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


class _Builder:
    """Values of a document's nodes, with a bound on their number."""

    def __init__(self) -> None:
        self.num_values = 0
        self.open_nodes: set[Node] = set()

    def build(self, node: Node, parent_mark: StringMark) -> Any:
        """Return the value of a node. Errors name the line of an alias, not that of its anchor."""
        mark = max(node.start_mark, parent_mark, key=lambda mark: mark.index)
        kind = str(node.tag).removeprefix(_TAG_PREFIX)
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise _error(f"more than {MAX_VALUES:,} values with aliases expanded", mark)
        if node in self.open_nodes:
            raise _error("an alias inside its own anchor", mark)
        if isinstance(node, ScalarNode):
            return _convert(node.value, kind, mark)
        self.open_nodes.add(node)
        if isinstance(node, SequenceNode) and kind == "seq":
            value: Any = [self.build(child, mark) for child in node.value]
        elif isinstance(node, MappingNode) and kind == "map":
            value = self._build_mapping(node, mark)
        else:
            raise _error(f"the value is not of type {kind}", mark)
        self.open_nodes.remove(node)
        return value

    def _build_mapping(self, node: MappingNode, mark: StringMark) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        values: dict[Any, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise _error("a list or mapping as a key", key_node.start_mark)
            name = key_node.value
            if name in lines:
                raise _error(f"duplicate key '{name}', first in line {lines[name]}", key_node.start_mark)
            lines[name] = key_node.start_mark.line + 1
            if str(key_node.tag) == f"{_TAG_PREFIX}merge":
                merged = self._build_merged(value_node, mark)
            else:
                values[self.build(key_node, mark)] = self.build(value_node, mark)
        return {**merged, **values}

    def _build_merged(self, node: Node, mark: StringMark) -> dict[Any, Any]:
        """Return the union of the mappings below a merge key ``<<``; the first that has a key wins."""
        merged: dict[Any, Any] = {}
        for source in node.value if isinstance(node, SequenceNode) else [node]:
            if not isinstance(source, MappingNode):
                raise _error("'<<' takes a mapping or a list of mappings", source.start_mark)
            merged = merged | {key: value for key, value in self.build(source, mark).items() if key not in merged}
        return merged


def _convert(text: str, kind: str, mark: StringMark) -> Any:
    if _UNUSABLE.search(text):
        raise _error("a NUL character or half a surrogate pair in a string", mark)
    try:
        return _CONVERSIONS[kind](text)
    except (ValueError, KeyError):
        raise _error(f"the value is not of type {kind}", mark) from None


def _error(problem: str, mark: StringMark) -> MarkedYAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=mark)
