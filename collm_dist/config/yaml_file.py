"""YAML files of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml.error import MarkedYAMLError, YAMLError

from collm_dist.config.yaml_document import parse_yaml
from collm_dist.errors import ConfigError

MAX_BYTES = 1 << 18


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
