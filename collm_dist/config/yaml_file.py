"""YAML files of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml.error import MarkedYAMLError, YAMLError

from collm_dist.config.yaml_document import parse_yaml
from collm_dist.errors import ConfigError

MAX_BYTES = 1 << 18
BASE_KEY = "base"


def read_config_file(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the mapping in a YAML file, merged over that of the file that its ``base`` names.

    Mappings are merged key by key; any other value replaces that of the base. The file's own keys come first.

    Args:
        path: the file; ``base`` is relative to its folder.
        derived: files that lead here through their ``base``.

    Raises:
        ConfigError: a file cannot be read or is not a YAML mapping, or ``base`` leads back to a derived file.
    """
    document = read_yaml(path)
    name = document.pop(BASE_KEY, None)
    if name is None:
        return document
    if not isinstance(name, str):
        raise ConfigError(f"{path}: {BASE_KEY}: should be the path of a YAML file ({name!r:.60})")
    base, derived = path.parent / name, (*derived, path)
    if not base.is_file():
        raise ConfigError(f"{path}: {BASE_KEY}: file '{base}' does not exist")
    if any(base.samefile(file) for file in derived):
        cycle = " -> ".join(str(file) for file in (*derived, base))
        raise ConfigError(f"{path}: {BASE_KEY}: the files lead back to one another: {cycle}")
    return _merge(document, read_config_file(base, derived))


def _merge(document: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    merged = dict(document)
    for key, value in base.items():
        if key not in document:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(document[key], dict):
            merged[key] = _merge(document[key], value)
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file cannot be read or is not a YAML mapping; the message has file and line.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"--config: '{path}' has more than {MAX_BYTES >> 10} KiB: not a configuration file")
        document = parse_yaml(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"--config: file '{path}' does not exist (relative to {Path.cwd()})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: '{path}' is not UTF-8 ({error}); save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config: {str(path)!r} cannot be read: {error}") from None
    except MarkedYAMLError as error:
        place = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise ConfigError(f"{place}: {error.problem}") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected sections such as 'run:' and 'dataset:', found {type(document).__name__}")
    return document


def get_text(document: dict[str, Any], section: str, name: str) -> str | None:
    """Return a string of a section in a mapping that need not be valid settings; None for anything else."""
    values = document.get(section)
    value = values.get(name) if isinstance(values, dict) else None
    return value if isinstance(value, str) else None
