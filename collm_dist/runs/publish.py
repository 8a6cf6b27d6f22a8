"""Publication of finished steps to a folder or object store (``run.publish_to``).

Below ``<publish_to>/<run name>/`` a step has its files of the run directory, without checkpoints, stack traces and
hidden files, and ``published.json`` with the size and SHA-256 of each. The index and the record are written last,
so a record implies a complete step. Unchanged files are not sent again, so an interrupted publication resumes. In
settings, records and cards the paths of this machine are replaced by their last names.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pa_fs
from tqdm import tqdm

from collm_dist.config import Config
from collm_dist.config.loader import dump_config, load_config
from collm_dist.errors import ArtifactError, ConfigError, DataError, LaunchError
from collm_dist.runs.damage import explain_read_errors
from collm_dist.runs.file_hashes import check_files, hash_once
from collm_dist.runs.local_paths import PathRemover, check_link
from collm_dist.runs.run_dir import STAGES, STEPS, RunDir, Step, normalize
from collm_dist.storage import explain_store_errors, is_store, join_uri, open_filesystem

INDEX = "published.json"
_BLOCK_BYTES = 8 << 20
# Checkpoints serve to resume only; later steps and recommenders read the other files.
_EXCLUDED = frozenset({"checkpoints"})
_SETTINGS = "config.yaml"


def build_publisher(config: Config, run_dir: RunDir) -> Publisher | None:
    """Return the publisher of a run; None without ``run.publish_to``.

    Raises:
        ConfigError: the URI cannot be opened.
    """
    uri = config.run.publish_to
    if uri is None:
        return None
    folder = normalize(run_dir.path)
    if "://" not in uri and normalize(Path(uri)).is_relative_to(folder):
        raise ConfigError(f"run.publish_to: '{uri}' lies in run.dir; set another folder")
    remover = PathRemover(config, run_dir)
    return Publisher(join_uri(uri, folder.name), run_dir, config.monitoring.progress_bar, remover)


def list_step_files(folder: Path) -> dict[str, Path]:
    """Return the files of a step by path relative to its folder, sorted; links are followed.

    Raises:
        ArtifactError: see ``check_link``; or an entry is neither a file nor a folder.
    """
    files = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name not in _EXCLUDED and not name.startswith("."))
        for name in folders:
            check_link(Path(place) / name, folder)
        for path in (Path(place) / name for name in sorted(names) if not name.startswith((".", "stacks-rank"))):
            check_link(path, folder)
            if not path.is_file():
                raise ArtifactError(f"{path} is not a file: remove it, or restore it from a copy")
            files[path.relative_to(folder).as_posix()] = path
    return files


class Publisher:
    """Publisher of the steps of one run."""

    def __init__(self, uri: str, run_dir: RunDir, show_progress: bool, remover: PathRemover | None = None) -> None:
        """Open the file system without writing.

        Args:
            uri: folder of the published run.
            run_dir: the run.
            show_progress: whether to show a progress bar.
            remover: removes paths of this machine; None = publish all files as they are.

        Raises:
            ConfigError: the URI cannot be opened.
        """
        self.uri, self._run_dir, self._show_progress, self._remover = uri, run_dir, show_progress, remover
        try:
            self._filesystem, self._base = open_filesystem(uri, "run.publish_to")
        except DataError as error:
            raise ConfigError(str(error)) from None

    def publish_file(self, name: str) -> None:
        """Copy a file of the run directory that belongs to no step, if it exists.

        Raises:
            LaunchError: it cannot be written.
            ArtifactError: it cannot be read.
        """
        path = self._run_dir.path / name
        with explain_read_errors(self._run_dir.path):
            if not path.exists():
                return
            source: Path | bytes = path
            if name == _SETTINGS and self._remover is not None:
                source = dump_config(self._remover.clean_config(load_config(path))).encode()
            entry = _describe(source)
            if not self._holds(name, entry["bytes"], entry["sha256"]):
                self._send(name, source, entry, None)

    def publish_step(self, step: Step) -> None:
        """Copy the new and changed files of a finished step, and print a summary.

        Raises:
            LaunchError: a file cannot be written, or reads back with other bytes.
            ArtifactError: a file is missing or has other bytes than its step wrote.
        """
        check_files(self._run_dir, step)
        folder = self._run_dir.step_dir(step)
        if step in STAGES:  # the anchor, which both stages read, is not a step of its own
            for path in sorted(self._run_dir.anchor_dir.glob("*")):
                check_link(path, self._run_dir.anchor_dir)
                self.publish_file(path.relative_to(self._run_dir.path).as_posix())
        with explain_read_errors(folder):
            sources = self._remove_paths(step, list_step_files(folder))
            index = {name: _describe(source) for name, source in sources.items()}
            self._publish(step, sources, index)

    def _remove_paths(self, step: Step, files: Mapping[str, Path]) -> dict[str, Path | bytes]:
        """Return the files of a step, those that may hold paths of this machine as bytes without them."""
        sources: dict[str, Path | bytes] = dict(files)
        if self._remover is None:
            return sources
        for name, path in files.items():
            if path.suffix in (".json", ".jsonl", ".md", ".txt", ".csv"):
                data = path.read_bytes()
                text = self._remover.clean_text(data.decode("utf-8", errors="surrogateescape"))
                if (cleaned := text.encode("utf-8", errors="surrogateescape")) != data:
                    sources[name] = cleaned
        hashes = {name: _describe(source)["sha256"] for name, source in sources.items() if isinstance(source, bytes)}
        record = self._remover.clean_record(self._run_dir.read_record(step), hashes)
        sources[self._run_dir.record_path(step).name] = json.dumps(record, indent=2, sort_keys=True).encode() + b"\n"
        return sources

    def _publish(self, step: Step, sources: Mapping[str, Path | bytes], index: Mapping[str, dict[str, Any]]) -> None:
        record, published = self._run_dir.record_path(step).name, self._list(step)
        text = json.dumps({"files": index}, indent=2, sort_keys=True).encode() + b"\n"
        sizes = {name: entry["bytes"] for name, entry in index.items()} | {INDEX: len(text)}
        if published == sizes and self._read(f"{step}/{INDEX}") == text and self._is_whole(step, index):
            print(f"{step}: published already ({self.uri}/{step})", flush=True)
            return
        self._withdraw(step)
        sent = 0
        with tqdm(
            total=sum(entry["bytes"] for entry in index.values()),
            desc=f"publishing {step}",
            unit="B",
            unit_scale=True,
            disable=None if self._show_progress else True,
        ) as bar:
            for name in [name for name in index if name != record]:
                sent += self._send_changed(step, name, sources[name], index[name], published, bar)
            for name in published.keys() - sizes.keys():
                self._delete(f"{step}/{name}")
            self._write(f"{step}/{INDEX}", text)
            self._send_changed(step, record, sources[record], index[record], {}, bar)
        total = sum(entry["bytes"] for entry in index.values()) / 2**20
        print(f"{step}: published {len(index):,} files, {total:,.1f} MiB, {len(index) - 1 - sent:,} of them already "
              f"there ({self.uri}/{step})", flush=True)  # fmt: skip

    def _withdraw(self, step: Step) -> None:
        """Delete the published records of a step and of later steps before its files change."""
        for later in reversed(STEPS[STEPS.index(step) :]):
            name = f"{later}/{self._run_dir.record_path(later).name}"
            with self._explain(name):
                is_published = self._filesystem.get_file_info(f"{self._base}/{name}").type == pa_fs.FileType.File
            if is_published:
                self._delete(name)

    def _is_whole(self, step: Step, index: Mapping[str, Mapping[str, Any]]) -> bool:
        """Return whether the published files have their bytes still; a store checks what it keeps by itself."""
        return is_store(self._filesystem) or all(
            self._holds(f"{step}/{name}", entry["bytes"], entry["sha256"]) for name, entry in index.items()
        )

    def _send_changed(
        self,
        step: Step,
        name: str,
        source: Path | bytes,
        entry: Mapping[str, Any],
        published: Mapping[str, int],
        bar: Any,
    ) -> int:
        """Send a file unless the same bytes are published; return the number of files sent."""
        if published.get(name) == entry["bytes"] and self._holds(f"{step}/{name}", entry["bytes"], entry["sha256"]):
            bar.update(entry["bytes"])
            return 0
        self._send(f"{step}/{name}", source, entry, bar)
        return 1

    def _send(self, name: str, source: Path | bytes, entry: Mapping[str, Any], bar: Any) -> None:
        file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
        with file, self._explain(name), self._open(name) as target:
            while block := file.read(_BLOCK_BYTES):
                target.write(block)
                if bar is not None:
                    bar.update(len(block))
        if not self._holds(name, entry["bytes"], entry["sha256"]):
            raise LaunchError(
                f"run.publish_to: {self.uri}/{name} reads back with other bytes; run the same command again, and "
                "check the store if the error persists"
            )

    def _write(self, name: str, data: bytes) -> None:
        with self._explain(name), self._open(name) as target:
            target.write(data)

    def _open(self, name: str) -> Any:
        path = f"{self._base}/{name}"
        if not is_store(self._filesystem):
            self._filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        if isinstance(self._filesystem, pa_fs.LocalFileSystem) and Path(path).is_symlink():
            Path(path).unlink()  # or its target would be written
        return self._filesystem.open_output_stream(path)

    def _read(self, name: str) -> bytes:
        with self._explain(name), self._filesystem.open_input_stream(f"{self._base}/{name}") as source:
            return bytes(source.read())

    def _holds(self, name: str, size: int, sha256: str) -> bool:
        """Return whether a published file, read back, has these bytes."""
        path, digest = f"{self._base}/{name}", hashlib.sha256()
        with self._explain(name):
            info = self._filesystem.get_file_info(path)
            if info.type != pa_fs.FileType.File or info.size != size:
                return False
            with self._filesystem.open_input_stream(path) as source:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
        return digest.hexdigest() == sha256

    def _delete(self, name: str) -> None:
        with self._explain(name):
            self._filesystem.delete_file(f"{self._base}/{name}")

    def _list(self, step: Step) -> dict[str, int]:
        """Return the sizes in bytes of a step's published files, by name."""
        folder = f"{self._base}/{step}"
        with self._explain(step):
            entries = self._filesystem.get_file_info(pa_fs.FileSelector(folder, allow_not_found=True, recursive=True))
        start = len(folder) + 1
        return {entry.path[start:]: entry.size for entry in entries if entry.type == pa_fs.FileType.File}

    @contextmanager
    def _explain(self, name: str) -> Iterator[None]:
        place = f"run.publish_to: {self.uri}/{name}"
        try:
            with explain_store_errors(self._filesystem, place):
                yield
        except (OSError, pa.ArrowException) as error:
            raise LaunchError(
                f"{place}: {error}\nmake space or allow writing there, or set run.publish_to elsewhere; then run the "
                "same command again: published files stay"
            ) from error


def _describe(source: Path | bytes) -> dict[str, Any]:
    """Return size and SHA-256 of a file, or of bytes."""
    if isinstance(source, bytes):
        return {"bytes": len(source), "sha256": hashlib.sha256(source).hexdigest()}
    return {"bytes": source.stat().st_size, "sha256": hash_once(source)}
