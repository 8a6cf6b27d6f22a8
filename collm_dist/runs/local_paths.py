"""Links in runs, and removal of local paths from runs that leave this machine; of a path only its last name stays."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from collm_dist.config import Config
from collm_dist.errors import ArtifactError
from collm_dist.runs.run_dir import STEPS, RunDir, add_record_hash

_PATH = re.compile(r"(?:file:/{0,2})?[/~][^\n<>]*")


def shorten_path(text: str) -> str:
    """Return the last name of an absolute path; any other text as it is."""
    return Path(text).name if _PATH.fullmatch(text) and "/" in text else text


def check_link(path: Path, folder: Path) -> None:
    """Check that links at or above a file of a step lead to the same part of that step, here or in another run.

    Raises:
        ArtifactError: it leads elsewhere, so that what leaves this machine would hold a file that is not the run's.
    """
    part = (folder.name, *path.relative_to(folder).parts)
    while path != folder:
        end = path.resolve()
        if path.is_symlink() and not end.is_relative_to(folder.resolve()) and end.parts[-len(part) :] != part:
            raise ArtifactError(
                f"{path} is a link to {end}, which is not the same part of a run: replace it with a copy, or remove it"
            )
        path, part = path.parent, part[:-1]


def check_links(run: Path) -> None:
    """Check that the links in a run are those that runs make, so that work in it changes no other files.

    A step and an entry of its folder may be links to the same part of another run: ``RunDir.withdraw`` removes such
    links before the step is redone. A step's ``checkpoints`` may be a link to any folder, such as one on another disk.
    The trials of a search are runs too: their steps are links to this run's steps, and so to those of the run that it
    reuses.

    Raises:
        ArtifactError: a link leads elsewhere, as it may in a run from someone else.
    """
    root = run.resolve()
    for path in _list_links(run):
        part, end = path.relative_to(run).parts, Path(os.path.realpath(path))  # resolve() refuses circles
        is_of_trial = len(part) > 4 and part[0].endswith("_search") and (part[1], part[3]) == ("trials", "run")
        if is_of_trial:
            part = part[4:]
        is_of_step = part[0] in STEPS and len(part) <= 2
        is_checkpoints = is_of_step and not is_of_trial and part[1:] == ("checkpoints",) and not end.is_file()
        is_same_part = is_of_step and end.parts[-len(part) :] == part
        if not (is_checkpoints or is_same_part or end.is_relative_to(root)):
            raise ArtifactError(
                f"{path} is a link to {end}, and work here would change that: replace it with a copy, or remove it"
            )


def _list_links(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield Path(entry.path)
            elif entry.is_dir():
                yield from _list_links(Path(entry.path))


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
            return shorten_path(value) if _PATH.fullmatch(value) else self.clean_text(value)
        return value

    def clean_config(self, config: Config) -> Config:
        """Return settings without the paths."""
        return Config.model_validate(self.clean(config.to_document()))

    def clean_record(self, record: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
        """Return the record of a step without the paths, with the hash of its content.

        Args:
            record: the record.
            hashes: SHA-256 of files of the step from which paths were removed.
        """
        cleaned: dict[str, Any] = self.clean(dict(record))
        files = cleaned.get("files", {})
        files.update({name: value for name, value in hashes.items() if name in files})
        return add_record_hash(cleaned)

    def _clean_key(self, key: str) -> str:
        prefix, is_input, path = key.partition("input.")
        if is_input and not prefix and _PATH.fullmatch(path):
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
