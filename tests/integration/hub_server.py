"""A server with the calls of the Hugging Face Hub that an upload makes: repositories in memory, files by content."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

WRITER, READER = "hf_writer_token_of_the_test", "hf_reader_token_of_the_test"
LICENSES = ("apache-2.0", "mit", "unknown", "other")


@dataclass
class Repo:
    """Attributes: private: whether only its owner may read it; files: content by path; commits: their messages."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """Attributes: endpoint: http://host:port; repos: by owner/name; objects: large files by SHA-256; broken: no PUT."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    broken: bool = False


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve an empty hub for as long as the block lasts. The owner of its tokens is ``me``."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/tree/main|/revision/main)?", path)
        repo = self.hub.repos.get(found[1]) if found else None
        if repo is None:
            self._answer(404, {"error": "Repository not found"}, code="RepoNotFound")
        elif found[2] == "/tree/main":
            self._answer(200, [{"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
                               for name, data in repo.files.items()])  # fmt: skip
        else:
            siblings = [{"rfilename": name} for name in repo.files]
            self._answer(200, {"id": found[1], "private": repo.private, "siblings": siblings, "sha": "0" * 40})

    def do_PUT(self):
        data = self._read()
        if self.hub.broken:
            self._answer(403, {"error": "storage is closed"})
            return
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self._answer(200, {})

    def do_POST(self):
        body, path = self._read(), self.path.partition("?")[0]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            self._validate(json.loads(body))
        elif token not in (WRITER, READER):
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif token == READER:
            self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            files = [{"path": name, "uploadMode": modes[name.endswith((".safetensors", ".parquet"))],
                      "shouldIgnore": False} for name in names]  # fmt: skip
            self._answer(200, {"files": files})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = []
            for item in json.loads(body)["objects"]:
                upload = {"href": f"{self.hub.endpoint}/objects/{item['oid']}"}
                objects.append({"oid": item["oid"], "size": item["size"], "actions": {"upload": upload}})
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines() if line])
        else:
            self._answer(404, {"error": f"no such call: {path}"})

    def _validate(self, body: dict[str, Any]) -> None:
        _, head, _ = body["content"].split("---", 2)
        card, errors = yaml.safe_load(head), []
        if card["license"] not in LICENSES:
            errors.append({"message": f'"license" must be one of {LICENSES}'})
        if card["license"] == "other" and not card.get("license_name"):
            errors.append({"message": '"license_name" is missing'})
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _create(self, body: dict[str, Any]) -> None:
        name = f"{body.get('organization') or 'me'}/{body['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repos:
            self._answer(409, {"error": "You already created this model repo", **url})
            return
        private = body.get("private", body.get("visibility") == "private")
        self.hub.repos[name] = Repo(bool(private))
        self._answer(200, url)

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repo = self.hub.repos[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
            elif line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo.files[value["path"]]
        oid = f"{len(repo.commits):040x}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, value: Any, code: str | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code is not None:
            self.send_header("X-Error-Code", code)
        if status >= 400:
            self.send_header("X-Error-Message", value.get("error", "error"))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass
