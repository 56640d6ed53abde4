"""A hub on this machine: the endpoints by which huggingface_hub makes a repository and sends a
folder. What arrives is kept."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN, OWNER = "hf_right", "someone"
LARGE = (".safetensors", ".gguf")  # sent by themselves, as the hub wants large files


@dataclass
class Repository:
    """private; {branch: {path: bytes}}; the messages of its commits."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """{name: repository}, and every request, as (method, path). fails: a path whose requests are
    answered by an error of the server."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    fails: str | None = None

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON) of a request."""
        self.requests.append((method, path))
        if method == "PUT" and (found := re.fullmatch("/large/([0-9a-f]+)", path)):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.large[found[1]] = body
            return 200, {}
        if self.fails and self.fails in path:
            return 400, {"error": "the disk is full"}
        if path == "/":
            return 200, {}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"name": OWNER, "type": "user"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, {"objects": [self._ticket(one) for one in json.loads(body)["objects"]]}
        found = re.fullmatch("/api/models/([^/]+/[^/]+)(?:/([a-z]+)/([^/]+))?", path)
        assert found, f"{method} {path}"
        return self._in_repository(*found.groups(), body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        if asked["organization"] != OWNER:
            return 403, {"error": f"You have no rights in {asked['organization']}"}
        name = f"{OWNER}/{asked['name']}"
        private = asked.get("private", asked.get("visibility") == "private")
        self.repositories[name] = Repository(private)
        return 200, {"url": f"{self.url}/{name}"}

    def _ticket(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.url}/large/{wanted['oid']}"}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": upload}}

    def _in_repository(self, name: str, verb: str, branch: str, body: bytes) -> tuple[int, Any]:
        repository = self.repositories.get(name)
        if repository is None:
            return 404, {"error": "Repository not found"}
        if verb is None:
            return 200, {"id": name, "private": repository.private, "sha": "0" * 40}
        if verb == "branch":
            repository.branches.setdefault(branch, {})
            return 200, {}
        if not name.startswith(f"{OWNER}/"):
            return 403, {"error": "You can only read this repository"}
        if verb == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        assert verb == "commit"
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "lfsFile":
                repository.branches[branch][value["path"]] = self.large[value["oid"]]
            else:
                assert line["key"] == "file"
                repository.branches[branch][value["path"]] = base64.b64decode(value["content"])
        return 200, {
            "commitOid": "1" * 40, "commitUrl": f"{self.url}/{name}/commit/{'1' * 40}",
            "hookOutput": "",
        }  # fmt: skip


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A hub that answers for as long as the context lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            path, token = self.path.partition("?")[0], self.headers.get("Authorization", "")
            status, found = hub.answer(self.command, path, token, self._body(length))
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def _body(self, length: int) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(length)
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
