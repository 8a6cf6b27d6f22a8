"""Loader of configurations: defaults < YAML < ``section.key=value``, with all errors at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml.error import YAMLError

from collm_dist.config import Config
from collm_dist.config.foreign_names import FOREIGN_NAMES
from collm_dist.config.removed_settings import drop_removed_settings
from collm_dist.config.yaml_document import dump_yaml, parse_value
from collm_dist.config.yaml_file import read_config_file
from collm_dist.errors import ConfigError

MAX_SHOWN_VALUE = 60
MAX_SHOWN_ERRORS = 100
# Deeper than any setting, cluster.deepspeed_extra included.
MAX_DEPTH = 20
# Python's stand-ins for bytes on the command line that are not UTF-8.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Load and check a configuration. Relative paths in its settings are relative to the working directory.

    Args:
        path: YAML file, with the settings of the file that its ``base`` names as defaults.
        overrides: ``section.key=value`` strings; later ones win.

    Raises:
        ConfigError: the file cannot be read or has errors; the message lists all of them.
    """
    document = read_config_file(Path(path))
    _fill_empty_sections(document, Config)
    errors = [*apply_overrides(document, overrides), *drop_removed_settings(document)]
    total, config = len(errors), None
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        described = _describe_all(error, document)
        total += len(described)
        errors += described
    if errors or config is None:
        lines = errors[:MAX_SHOWN_ERRORS]
        if total > len(lines):
            lines.append(f"and {total - len(lines)} more")
        count = "1 error" if total == 1 else f"{total} errors"
        raise ConfigError(f"{path}: {count} in the configuration\n  " + "\n  ".join(lines))
    return config


def dump_config(config: Config) -> str:
    """Return the whole configuration as YAML that ``load_config`` reads back equal.

    Defaults that follow from other settings are a comment, so they still follow when one of these is overridden.
    """
    following = ", ".join(f"{name} {json.dumps(value)}" for name, value in config.list_following().items())
    comment = f"# Not set, so they follow from other settings: {following}\n" if following else ""
    return comment + dump_yaml(config.to_document())


def get_setting(config: Config, dotted: str) -> Any:
    """Return the value of a setting by its dotted name, as plain JSON.

    Raises:
        ConfigError: there is no such setting.
    """
    value: Any = config.model_dump(mode="json")
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ConfigError(f"{dotted}: no such setting{suggest_name(dotted)}")
        value = value[part]
    return value


def change_settings(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return a configuration with new values of settings, by dotted name.

    Raises:
        ConfigError: a setting does not exist, or the configuration is invalid with the new values.
    """
    document, following = config.to_document(), config.list_following()
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        section: Any = document
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or (last not in section and dotted not in following):
            raise ConfigError(f"{dotted}: no such setting{suggest_name(dotted)}")
        section[last] = value
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe_all(error, document)[:MAX_SHOWN_ERRORS])) from None


def list_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and pydantic's field info of every setting, in order, without the sections themselves."""
    for name, field in model.model_fields.items():
        section = get_section(field.annotation)
        if section is None:
            yield f"{prefix}{name}", field
        else:
            yield from list_fields(section, f"{prefix}{name}.")


def get_section(annotation: Any) -> type[BaseModel] | None:
    """Return the class of the section that a field holds, None for other fields."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set ``section.key=value`` in a document and return the errors.

    A setting that holds text takes the value as it is, unless it is YAML for a string or null.
    """
    errors = []
    texts = {name for name, field in list_fields(Config) if _holds_text(field.annotation)}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        *parents, last = dotted.split(".")
        if _SURROGATE.search(override):
            errors.append(f"{override!r}: is not UTF-8")
            continue
        if len(parents) >= MAX_DEPTH:
            errors.append(f"{dotted[:MAX_SHOWN_VALUE]}...: settings are not nested that deeply")
            continue
        if not equals or not all([*parents, last]):
            errors.append(f"{override}: an override must have the form section.key=value")
            continue
        target: Any = document
        for parent in parents:
            target = target.setdefault(parent, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            errors.append(f"{dotted}: '{'.'.join(parents)}' is not a section")
            continue
        try:
            value = parse_value(text)
            is_text = dotted in texts and not isinstance(value, str | None)
            target[last] = text if is_text else value
        except YAMLError:
            if dotted in texts:  # such as {title} by {author}
                target[last] = text
                continue
            errors.append(f"{dotted}: malformed list, mapping or quoted string ({text})")
    return errors


def _holds_text(annotation: Any) -> bool:
    """Return whether a setting's values are strings or null, and nothing else."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = {get_args(part)[0] if get_origin(part) is Annotated else part for part in parts} - {NoneType}
    return kinds == {str}


def suggest_name(dotted: str) -> str:
    """Return a hint at the meaning of an unknown name: its name here or the nearest name; empty if there is none."""
    last = dotted.rsplit(".", 1)[-1]
    names = [name for name, _ in list_fields(Config)]
    same = [name for name in names if name.rsplit(".", 1)[-1] == last]
    if last in FOREIGN_NAMES:
        return f" - in collm-dist: {FOREIGN_NAMES[last]}"
    if same:
        return " - nearest name " + " or ".join(f"'{name}'" for name in same[:3])
    candidates = names if "." in dotted else [*Config.model_fields, *names]
    matches = difflib.get_close_matches(dotted, candidates, n=1, cutoff=0.6)
    if not matches:
        by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
        matches = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    return f" - nearest name '{matches[0]}'" if matches else ""


def _fill_empty_sections(document: dict[str, Any], model: type[BaseModel]) -> None:
    """Replace null, which YAML gives for a section without settings, by an empty section."""
    for name, field in model.model_fields.items():
        section = get_section(field.annotation)
        if section is not None and name in document:
            if document[name] is None:
                document[name] = {}
            if isinstance(document[name], dict):
                _fill_empty_sections(document[name], section)


def _describe_all(error: ValidationError, document: Mapping[str, Any]) -> list[str]:
    """Return the lines for pydantic's errors: one for a setting of several kinds, such as a number or a word.

    Pydantic gives an error for each kind, with the kind in its place, where the document has nothing.
    """
    lines: dict[Any, str] = {}
    by_place: dict[tuple[Any, ...], list[str]] = {}
    for number, detail in enumerate(error.errors()):
        place = _leave_out_kinds(document, detail["loc"])
        if detail["type"] in ("missing", "value_error") or place == detail["loc"]:
            lines[number] = _describe(detail)
            continue
        messages = by_place.setdefault(place, [])
        if detail["msg"] not in messages:
            messages.append(detail["msg"])
        joined = ", or ".join([messages[0], *(message.replace("Input ", "", 1) for message in messages[1:])])
        lines[place] = _describe({**detail, "loc": place, "type": "kinds", "msg": joined})
    return list(lines.values())


def _leave_out_kinds(document: Any, place: Sequence[Any]) -> tuple[Any, ...]:
    """Return the parts of a place that lead to a value in nested dictionaries and lists."""
    parts = []
    for part in place:
        is_key = isinstance(document, dict) and part in document
        if is_key or (isinstance(document, list | tuple) and isinstance(part, int) and part < len(document)):
            document = document[part]
            parts.append(part)
    return tuple(parts)


def _describe(detail: Mapping[str, Any]) -> str:
    """Return the line for an error of pydantic."""
    dotted = ".".join(str(part) for part in detail["loc"])
    value, kind = detail["input"], detail["type"]
    if kind == "extra_forbidden":
        return f"{dotted}: no such setting{_format_value(value)}{suggest_name(dotted)}"
    if kind == "missing":
        return f"{dotted}: is required"
    if kind == "value_error":
        message = str(detail["ctx"]["error"])
        return f"{dotted}: {message}" if dotted else message
    message = detail["msg"].replace("Input should", "should", 1)
    choices = detail.get("ctx", {}).get("expected", "") if kind == "literal_error" else ""
    valid = [choice.strip("' ") for choice in choices.replace(" or ", ",").split(",")]
    matches = difflib.get_close_matches(str(value), valid)
    hint = f" - nearest name '{matches[0]}'" if matches else ""
    return f"{dotted}: {message}{_format_value(value)}{hint}"


def _format_value(value: Any) -> str:
    text = repr(value)
    return f" ({text if len(text) <= MAX_SHOWN_VALUE else text[:MAX_SHOWN_VALUE] + '...'})"
