"""Loading a configuration: defaults < YAML < ``section.key=value``, with every mistake at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
# Deeper than any setting, also below cluster.deepspeed_extra.
MAX_DEPTH = 20
# What Python makes of bytes on the command line that are no UTF-8.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Load and check a configuration. Relative paths in it stay relative to the working directory.

    Args:
        path: YAML file; its ``base`` names another one, whose settings it changes.
        overrides: ``section.key=value``, later ones win.

    Raises:
        ConfigError: the file cannot be read or something in it is wrong; the message lists every mistake.
    """
    document = read_config_file(Path(path))
    _fill_empty_sections(document, Config)
    errors = [*apply_overrides(document, overrides), *drop_removed_settings(document)]
    total, config = len(errors), None
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        details = error.errors()
        total += len(details)
        errors += [_describe(detail) for detail in details[:MAX_SHOWN_ERRORS]]
    if errors or config is None:
        lines = errors[:MAX_SHOWN_ERRORS]
        if total > len(lines):
            lines.append(f"and {total - len(lines)} more")
        count = "1 mistake" if total == 1 else f"{total} mistakes"
        raise ConfigError(f"{path}: {count} in the configuration\n  " + "\n  ".join(lines))
    return config


def dump_config(config: Config) -> str:
    """Return the whole configuration as YAML that ``load_config`` reads back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def list_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and pydantic's field info of every setting, sections left out, in order."""
    for name, field in model.model_fields.items():
        section = get_section(field.annotation)
        if section is None:
            yield f"{prefix}{name}", field
        else:
            yield from list_fields(section, f"{prefix}{name}.")


def get_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, if it holds one."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Put ``section.key=value`` into a document and return the mistakes."""
    errors = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        *parents, last = dotted.split(".")
        if _SURROGATE.search(override):
            errors.append(f"{override!r}: is no UTF-8 text")
            continue
        if len(parents) >= MAX_DEPTH:
            errors.append(f"{dotted[:MAX_SHOWN_VALUE]}...: no setting lies that deep")
            continue
        if not equals or not all([*parents, last]):
            errors.append(f"{override}: an override is written section.key=value")
            continue
        target: Any = document
        for parent in parents:
            target = target.setdefault(parent, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            errors.append(f"{dotted}: '{'.'.join(parents)}' is no section")
            continue
        try:
            target[last] = parse_value(text)
        except YAMLError:
            errors.append(f"{dotted}: a list, mapping or quoted text that is not closed ({text})")
    return errors


def suggest_name(dotted: str) -> str:
    """Return a hint what an unknown name may mean: our name for another tool's, or the nearest one; or nothing."""
    last = dotted.rsplit(".", 1)[-1]
    names = [name for name, _ in list_fields(Config)]
    same = [name for name in names if name.rsplit(".", 1)[-1] == last]
    if last in FOREIGN_NAMES:
        return f" - here it is {FOREIGN_NAMES[last]}"
    if same:
        return " - nearest name " + " or ".join(f"'{name}'" for name in same[:3])
    candidates = names if "." in dotted else [*Config.model_fields, *names]
    matches = difflib.get_close_matches(dotted, candidates, n=1, cutoff=0.6)
    if not matches:
        by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
        matches = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    return f" - nearest name '{matches[0]}'" if matches else ""


def _fill_empty_sections(document: dict[str, Any], model: type[BaseModel]) -> None:
    """A section with nothing below its name is null in YAML; it means the defaults."""
    for name, field in model.model_fields.items():
        section = get_section(field.annotation)
        if section is not None and name in document:
            if document[name] is None:
                document[name] = {}
            if isinstance(document[name], dict):
                _fill_empty_sections(document[name], section)


def _describe(detail: Mapping[str, Any]) -> str:
    """Return the line for one of pydantic's findings."""
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
