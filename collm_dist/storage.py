"""Where files are: local paths, folders and globs, object stores (s3://, gs://) and whatever else fsspec knows.

Credentials, regions and endpoints come from the environment, never from a URI: URIs are written into records.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pa_fs

from collm_dist.errors import DataError, LaunchError

# What stores say, as Arrow passes it on, and what to do about it.
_STORE_FAULTS = (
    ("NO_SUCH_BUCKET|BucketNotFound|bucket does not exist", "make the bucket, or correct its name"),
    (
        "ACCESS_DENIED|ACCESS_KEY|SIGNATURE|TOKEN|CREDENTIALS|PERMISSION_DENIED|UNAUTHENTICATED|HTTP status 40[13]",
        "give credentials that may do this in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
        "AWS_PROFILE; GOOGLE_APPLICATION_CREDENTIALS)",
    ),
    (
        "MissingContentLength|HTTP status 411",
        "this store takes no checksums of streams: set AWS_REQUEST_CHECKSUM_CALCULATION=WHEN_REQUIRED in the "
        "environment",
    ),
)
_UNREACHABLE = "see that the store is up and that this machine reaches it (AWS_ENDPOINT_URL, AWS_REGION, proxies)"


def open_filesystem(uri: str, key: str = "dataset.path") -> tuple[Any, str]:
    """Return the file system and the path in it.

    Args:
        uri: a local path, or scheme://...
        key: the setting that it comes from, for messages.

    Raises:
        DataError: the scheme or an option is not known here.
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

        if re.match(r"(s3|gs|gcs)://", uri):  # Arrow's own; its word counts
            raise DataError(f"{key}: '{uri}' cannot be opened: {refusal}") from None
        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise DataError(f"{key}: '{uri}' cannot be opened: {error}") from error
        return pa_fs.PyFileSystem(pa_fs.FSSpecHandler(filesystem)), path


def is_store(filesystem: Any) -> bool:
    """Return whether files are reached over a network, by a client that may be refused."""
    return isinstance(filesystem, pa_fs.S3FileSystem | pa_fs.GcsFileSystem)


@contextmanager
def explain_store_errors(filesystem: Any, what: str) -> Iterator[None]:
    """Raise LaunchError where an object store cannot be reached or refuses; its own words are in the message.

    What a local disk says passes through, and so does what is said of the bytes of a file.

    Args:
        filesystem: that the block works on.
        what: setting and URI.

    Raises:
        LaunchError: with the remedy.
    """
    try:
        yield
    except OSError as error:
        said = str(error)
        if not is_store(filesystem) or not re.search(r"AWS Error|google::cloud|curlCode|GcsFileSystem", said):
            raise
        remedy = next((one for pattern, one in _STORE_FAULTS if re.search(pattern, said)), _UNREACHABLE)
        raise LaunchError(f"{what}: {said}\n{remedy}; then run the same command again") from None


def split_query(uri: str) -> tuple[str, str]:
    """Return a URI without its options, and the options with their question mark; a path has none."""
    head, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return head, mark + query


def join_uri(uri: str, *parts: str) -> str:
    """Return a URI further down, with the same options."""
    head, query = split_query(uri)
    return "/".join([head.rstrip("/"), *parts]) + query


def list_files(uri: str, key: str) -> list[str]:
    """Return the files behind a URI (file, folder or glob) in sorted order; hidden files are left out.

    Raises:
        DataError: there are none, or they cannot be listed; the message names the config key.
        LaunchError: an object store cannot be reached or refuses.
    """
    filesystem, path = open_filesystem(uri, key)
    magic = re.search(r"[*?\[]", path)
    base = path[: magic.start()].rpartition("/")[0] if magic else path
    try:
        with explain_store_errors(filesystem, f"{key}: '{uri}' cannot be listed"):
            info = filesystem.get_file_info(base)
            found = _list_folder(filesystem, base) if info.type == pa_fs.FileType.Directory else []
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{key}: {uri!r} cannot be listed: {error}") from None
    if info.type == pa_fs.FileType.NotFound:
        raise DataError(f"{key}: there is no file or folder '{uri}'")
    if info.type == pa_fs.FileType.Unknown:
        raise DataError(f"{key}: '{uri}' is neither a file nor a folder, but a pipe or a device: save it as a file")
    if info.type == pa_fs.FileType.File:
        return [uri]
    head, query = split_query(uri)
    prefix = head[: len(head) - len(path)] if head.endswith(path) else ""
    found = [one for one in found if not any(part[0] in "._" for part in PurePosixPath(one[len(base) :]).parts[1:])]
    if magic:
        found = [one for one in found if fnmatch.fnmatch(one, path)]
    if not found:
        raise DataError(f"{key}: '{uri}' holds no files")
    return [prefix + one + query for one in sorted(found)]


def _list_folder(filesystem: Any, base: str) -> list[str]:
    """Return the paths of all files below a folder; local ones once each, whatever links lead to them or back."""
    if not isinstance(filesystem, pa_fs.LocalFileSystem):
        entries = filesystem.get_file_info(pa_fs.FileSelector(base, recursive=True))
        return [entry.path for entry in entries if entry.type == pa_fs.FileType.File]

    def stop(error: OSError) -> None:
        raise error

    found: dict[Path, str] = {}
    folders_seen: set[Path] = set()
    for folder, folders, names in os.walk(base, followlinks=True, onerror=stop):
        folders.sort()
        if (real := Path(folder).resolve()) in folders_seen:
            folders.clear()
            continue
        folders_seen.add(real)
        for path in (Path(folder, name) for name in sorted(names)):
            if path.is_file():  # no pipe, no device, no link to nowhere
                found.setdefault(path.resolve() if path.is_symlink() else real / path.name, str(path))
    return list(found.values())


def describe_files(uris: list[str]) -> dict[str, Any]:
    """Return size and modification time of each file, for fingerprints.

    Raises:
        LaunchError: an object store cannot be reached or refuses.
    """
    described = {}
    for uri in dict.fromkeys(uris):
        filesystem, path = open_filesystem(uri)
        with explain_store_errors(filesystem, uri):
            info = filesystem.get_file_info(path)
        described[uri] = {"size": info.size, "mtime_ns": info.mtime_ns}
    return described
