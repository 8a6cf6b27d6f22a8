"""YAML 1.2 documents of settings.

Plain scalars follow the JSON schema of YAML 1.2, plus ``~`` for null: ``1e-4`` is a number; ``yes``, ``off``,
``12:30``, ``007`` and dates are strings. Aliases become copies, so that an override of one setting never changes
another.
"""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StringMark, YAMLError
from ruamel.yaml.nodes import Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

# Counted with aliases expanded: ten lines of aliases of aliases are a billion values.
MAX_VALUES = 100_000
MAX_NUMBER_LENGTH = 1000

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
        if node is None:
            return None
        _Guard().measure(node)
        return _copy_aliases(yaml.constructor.construct_document(node))
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


class _Guard:
    """Limits on a document's nodes: their number with aliases expanded, and what keys and strings may be."""

    def __init__(self) -> None:
        self.sizes: dict[Node, int] = {}
        self.open_nodes: set[Node] = set()

    def measure(self, node: Node) -> int:
        """Return the number of values in a node with aliases expanded.

        Raises:
            YAMLError: there are too many, an alias leads back to itself, a key is not a scalar or repeated, or a string
                cannot be used.
        """
        if node in self.open_nodes:
            raise _error("an alias inside its own anchor", node.start_mark)
        if node not in self.sizes:
            self.open_nodes.add(node)
            self.sizes[node] = 1 + sum(map(self.measure, self._list_children(node)))
            self.open_nodes.remove(node)
        if self.sizes[node] > MAX_VALUES:
            raise _error(f"more than {MAX_VALUES:,} values with aliases expanded", node.start_mark)
        return self.sizes[node]

    def _list_children(self, node: Node) -> list[Node]:
        kind = str(node.tag).removeprefix(_TAG_PREFIX)
        if not _has_kind(node, kind):
            raise _error(f"the value is not of type {kind}", node.start_mark)
        if isinstance(node, ScalarNode):
            if _UNUSABLE.search(node.value):
                raise _error("a NUL character or half a surrogate pair in a string", node.start_mark)
            return []
        if isinstance(node, SequenceNode):
            return list(node.value)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise _error("a list or mapping as a key", key.start_mark)
            if key.value in lines:
                first = lines[key.value]
                raise _error(f"duplicate key '{key.value}', first in line {first}", key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return [child for pair in node.value for child in pair]


def _has_kind(node: Node, kind: str) -> bool:
    """Return whether a node is what its tag says, also where the document names the tag."""
    if not isinstance(node, ScalarNode):
        return kind == ("seq" if isinstance(node, SequenceNode) else "map")
    patterns = {tag.removeprefix(_TAG_PREFIX): pattern for tag, pattern in _PLAIN_SCALARS}
    accepted = [patterns[name] for name in (kind, "int" if kind == "float" else kind) if name in patterns]
    is_plain = any(pattern.match(node.value) for pattern in accepted)
    return kind == "str" or (is_plain and len(node.value) <= MAX_NUMBER_LENGTH)


def _copy_aliases(value: Any) -> Any:
    """Return the value with a copy of its own in the place of each alias."""
    if isinstance(value, dict):
        return {key: _copy_aliases(child) for key, child in value.items()}
    return [_copy_aliases(child) for child in value] if isinstance(value, list) else value


def _error(problem: str, mark: StringMark) -> MarkedYAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=mark)
