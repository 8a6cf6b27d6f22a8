"""Files behind URIs: local paths, folders and globs, object stores (s3://, gs://), and other fsspec schemes.

Credentials, regions and endpoints come from the environment, never from a URI, because URIs are written to records.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as pa_fs

from collm_dist.errors import DataError, LaunchError

# Patterns in error messages of object stores, with remedies.
_STORE_FAULTS = (
    ("NO_SUCH_BUCKET|BucketNotFound|bucket does not exist", "create the bucket, or correct its name"),
    (
        "ACCESS_DENIED|ACCESS_KEY|SIGNATURE|TOKEN|CREDENTIALS|PERMISSION_DENIED|UNAUTHENTICATED|HTTP status 40[13]",
        "set credentials with these permissions in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
        "AWS_PROFILE; GOOGLE_APPLICATION_CREDENTIALS)",
    ),
    (
        "MissingContentLength|HTTP status 411",
        "this store does not support checksums of streams: set AWS_REQUEST_CHECKSUM_CALCULATION=WHEN_REQUIRED in the "
        "environment",
    ),
)
_UNREACHABLE = "check that the store is up and reachable from this machine (AWS_ENDPOINT_URL, AWS_REGION, proxies)"


def open_filesystem(uri: str, key: str = "dataset.path") -> tuple[Any, str]:
    """Return the file system and the path in it.

    Args:
        uri: a local path, or scheme://...
        key: name of the setting, for messages.

    Raises:
        DataError: the scheme or an option is not supported.
    """
    if "://" not in uri:
        try:
            return pa_fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
        except RuntimeError as error:  # a home directory that does not exist
            raise DataError(f"{key}: '{uri}' cannot be opened: {error}") from None
    try:
        return pa_fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as refusal:
        import fsspec

        if re.match(r"(s3|gs|gcs)://", uri):  # Arrow's own schemes: fsspec is not tried
            raise DataError(f"{key}: '{uri}' cannot be opened: {refusal}") from None
        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise DataError(f"{key}: '{uri}' cannot be opened: {error}") from error
        return pa_fs.PyFileSystem(pa_fs.FSSpecHandler(filesystem)), path


def find_local_path(uri: str) -> Path | None:
    """Return the path of a local file, or None for other file systems.

    Raises:
        DataError: the scheme or an option is not supported.
    """
    filesystem, path = open_filesystem(uri)
    return Path(path) if isinstance(filesystem, pa_fs.LocalFileSystem) else None


def is_store(filesystem: Any) -> bool:
    """Return whether a file system is an object store."""
    return isinstance(filesystem, pa_fs.S3FileSystem | pa_fs.GcsFileSystem)


@contextmanager
def explain_store_errors(filesystem: Any, action: str) -> Iterator[None]:
    """Raise LaunchError if an object store is unreachable or denies access; other errors pass through.

    Args:
        filesystem: the file system that the block uses.
        action: the failing action with its URI, for the message.

    Raises:
        LaunchError: with the store's message and a remedy.
    """
    try:
        yield
    except OSError as error:
        message = str(error)
        if not is_store(filesystem) or not re.search(r"AWS Error|google::cloud|curlCode|GcsFileSystem", message):
            raise
        remedy = next((remedy for pattern, remedy in _STORE_FAULTS if re.search(pattern, message)), _UNREACHABLE)
        raise LaunchError(f"{action}: {message}\n{remedy}; then run the same command again") from None


def split_query(uri: str) -> tuple[str, str]:
    """Split a URI into the part before its options and the options with their question mark; paths have no options."""
    head, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return head, mark + query


def join_uri(uri: str, *parts: str) -> str:
    """Append path parts to a URI, keeping its options."""
    head, query = split_query(uri)
    return "/".join([head.rstrip("/"), *parts]) + query


def find_lake_table(filesystem: Any, folder: str) -> Literal["delta", "iceberg"] | None:
    """Return which kind of lakehouse table a folder holds, or None for other folders."""
    delta, iceberg = filesystem.get_file_info([f"{folder}/_delta_log", f"{folder}/metadata"])
    if delta.type == pa_fs.FileType.Directory:
        return "delta"
    if iceberg.type != pa_fs.FileType.Directory:
        return None
    entries = filesystem.get_file_info(pa_fs.FileSelector(iceberg.path))
    return "iceberg" if any(entry.path.endswith(".metadata.json") for entry in entries) else None


def list_files(uri: str, key: str, *, may_be_empty: bool = False) -> list[str]:
    """Return the files behind a URI (file, folder or glob) in sorted order, without hidden files.

    Raises:
        DataError: there is nothing, no file in a folder that may not be empty, a lakehouse table, or it cannot be
            listed; the message names the setting.
        LaunchError: an object store is unreachable or denies access.
    """
    filesystem, path = open_filesystem(uri, key)
    magic = re.search(r"[*?\[]", path)
    base = path[: magic.start()].rpartition("/")[0] if magic else path
    try:
        with explain_store_errors(filesystem, f"{key}: '{uri}' cannot be listed"):
            info = filesystem.get_file_info(base)
            is_folder = info.type == pa_fs.FileType.Directory
            lake = find_lake_table(filesystem, base) if is_folder and not uri.startswith(("http:", "https:")) else None
            paths = _list_folder(filesystem, base) if is_folder and lake is None else []
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{key}: {uri!r} cannot be listed: {error}") from None
    if info.type == pa_fs.FileType.NotFound:
        raise DataError(f"{key}: there is no file or folder '{uri}'")
    if info.type == pa_fs.FileType.Unknown:
        raise DataError(f"{key}: '{uri}' is neither a file nor a folder, but a pipe or a device: save it as a file")
    if lake is not None:
        remedy = f"set dataset.format to {lake}" if key == "dataset.path" else "write the rows that are meant to files"
        raise DataError(
            f"{key}: '{uri}' holds {'a Delta' if lake == 'delta' else 'an Iceberg'} table, whose files also have "
            f"deleted and outdated rows: {remedy}"
        )
    if info.type == pa_fs.FileType.File:
        return [uri]
    head, query = split_query(uri)
    prefix = head[: len(head) - len(path)] if head.endswith(path) else ""
    paths = [file for file in paths if not any(part[0] in "._" for part in PurePosixPath(file[len(base) :]).parts[1:])]
    if magic:
        paths = [file for file in paths if fnmatch.fnmatch(file, path)]
    if not paths and not may_be_empty:
        raise DataError(f"{key}: '{uri}' holds no files")
    return [prefix + file + query for file in sorted(paths)]


def _list_folder(filesystem: Any, base: str) -> list[str]:
    """Return the paths of all files below a folder; local files occur once, even if several links lead to them."""
    if not isinstance(filesystem, pa_fs.LocalFileSystem):
        entries = filesystem.get_file_info(pa_fs.FileSelector(base, recursive=True))
        return [entry.path for entry in entries if entry.type == pa_fs.FileType.File]

    def stop(error: OSError) -> None:
        raise error

    files: dict[Path, str] = {}
    folders_seen: set[Path] = set()
    for folder, folders, names in os.walk(base, followlinks=True, onerror=stop):
        folders.sort()
        if (real := Path(folder).resolve()) in folders_seen:
            folders.clear()
            continue
        folders_seen.add(real)
        for path in (Path(folder, name) for name in sorted(names)):
            if path.is_file():  # excludes pipes, devices and broken links
                files.setdefault(path.resolve() if path.is_symlink() else real / path.name, str(path))
    return list(files.values())


def describe_files(uris: list[str]) -> dict[str, Any]:
    """Return size and modification time of each file, for fingerprints.

    Raises:
        LaunchError: an object store is unreachable or denies access.
    """
    described = {}
    for uri in dict.fromkeys(uris):
        filesystem, path = open_filesystem(uri)
        with explain_store_errors(filesystem, uri):
            info = filesystem.get_file_info(path)
        described[uri] = {"size": info.size, "mtime_ns": info.mtime_ns}
    return described
