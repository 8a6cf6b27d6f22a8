"""Removal of this machine's paths from what leaves it: of an absolute path only the last name stays."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collm_dist.config import Config
from collm_dist.runs.run_dir import RunDir

_PATH = re.compile(r"[/~][^\n<>]*")


class PathRemover:
    """Replaces the absolute paths of a run's settings, and all strings that are absolute paths, by their last names."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        """Collect the paths."""
        settings = [text for text in _list_strings(config.model_dump(mode="json")) if _PATH.fullmatch(text)]
        known = {*settings, str(run_dir.path.absolute()), str(run_dir.path.resolve())}
        known |= {str(Path(text).expanduser().resolve()) for text in settings}
        self._known = sorted((path for path in known if len(Path(path).parts) > 1), key=len, reverse=True)

    def clean_text(self, text: str) -> str:
        """Return a text without the paths."""
        for path in self._known:
            # Not within another path or a URI.
            name = Path(path).name.replace("\\", r"\\")
            text = re.sub(rf"(?<![\w./~-]){re.escape(path)}(?![\w.-])", name, text)
        return text

    def clean(self, value: Any) -> Any:
        """Return a JSON value without the paths, in its strings and keys."""
        if isinstance(value, dict):
            cleaned: dict[str, Any] = {}
            for key, item in value.items():
                name = self._clean_key(key)
                while name in cleaned:  # files of the same name in different folders
                    name += "'"
                cleaned[name] = self.clean(item)
            return cleaned
        if isinstance(value, list):
            return [self.clean(item) for item in value]
        if isinstance(value, str):
            return Path(value).name if _PATH.fullmatch(value) and "/" in value else self.clean_text(value)
        return value

    def _clean_key(self, key: str) -> str:
        prefix, is_input, path = key.partition("input.")
        if is_input and not prefix and path.startswith("/"):
            return f"input.{Path(path).name}"
        return self.clean_text(key)


def _list_strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _list_strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _list_strings(item)
    elif isinstance(value, str):
        yield value
