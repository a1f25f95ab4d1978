"""A stand-in of the Hub on this machine: the requests of huggingface_hub's upload, answered from memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = ".safetensors", ".gguf"
"""What goes by LFS."""


@dataclass
class Repo:
    """A repository: its branches, and the messages of their commits."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)
    requests: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Pull requests."""

    def sha(self, branch: str) -> str:
        """Changes with every commit."""
        return hashlib.sha1(f"{branch} {len(self.messages)}".encode(), usedforsecurity=False).hexdigest()


@dataclass
class Hub:
    """What it holds, what it was asked, and what it is to refuse."""

    endpoint: str = ""
    owner: str = "me"
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    refuse: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """By a part of `METHOD /path`: status and headers."""

    def answer(self, method: str, target: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON, headers) of a request."""
        address = urlsplit(target)
        path, query = unquote(address.path), parse_qs(address.query)
        self.asked.append(f"{method} {path}")
        for part, (status, headers) in self.refuse.items():
            if part in f"{method} {path}":
                return status, {"error": "so it is"}, headers
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/lfs/"):
            self.large[path.removeprefix("/lfs/")] = body
            return 200, {}, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._action(one) for one in json.loads(body)["objects"]]}, {}
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        repo = self.repos.get(f"{owner}/{name}")
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return self._of(repo, f"{owner}/{name}", rest, body, new="create_pr" in query)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{asked['organization'] or self.owner}/{asked['name']}"
        there = name in self.repos
        self.repos.setdefault(name, Repo(private=asked.get("visibility") == "private" or bool(asked.get("private"))))
        return 409 if there else 200, {"url": f"{self.endpoint}/{name}"}, {}

    def _action(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.large:
            return one
        return one | {"actions": {"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}"}}}

    def _of(self, repo: Repo, name: str, rest: list[str], body: bytes, *, new: bool) -> tuple[int, Any, dict[str, str]]:
        verb, branch = rest[0] if rest else "", "/".join(rest[1:]) or "main"
        if verb == "branch":
            there = branch in repo.branches
            repo.branches.setdefault(branch, dict(repo.branches["main"]))
            return 409 if there else 200, {}, {}
        if branch not in repo.branches:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        if verb in ("", "revision"):
            return 200, {"id": name, "sha": repo.sha(branch), "private": repo.private, "siblings": []}, {}
        if verb == "preupload":
            files = json.loads(body)["files"]
            return 200, {"files": [self._mode(one["path"], repo.branches[branch]) for one in files]}, {}
        assert verb == "commit"
        head, *changes = [json.loads(line) for line in body.splitlines()]
        files = dict(repo.branches[branch]) if new else repo.branches[branch]
        for change in changes:
            value = change["value"]
            large = change["key"] == "lfsFile"
            files[value["path"]] = self.large[value["oid"]] if large else base64.b64decode(value["content"])
        repo.messages.append(head["value"]["summary"])
        url = f"{self.endpoint}/{name}/discussions/{len(repo.messages)}"
        if new:
            repo.requests[url] = files
        sha = repo.sha(branch)
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": url}, {}

    def _mode(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        large, old = path.endswith(LARGE), files.get(path)
        oid = None
        if old is not None:
            git = hashlib.sha1(b"blob %d\0" % len(old) + old, usedforsecurity=False)
            oid = (hashlib.sha256(old) if large else git).hexdigest()
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


@contextmanager
def serving() -> Iterator[Hub]:
    """The stand-in at an address of this machine until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = (
                self.rfile.read(int(self.headers.get("Content-Length") or 0)) if not self._chunked() else self._read()
            )
            if "Authorization" in self.headers:
                hub.tokens.add(self.headers["Authorization"])
            status, data, headers = hub.answer(self.command, self.path, body)
            content = json.dumps(data).encode()
            self.send_response(status)
            for key, value in {**headers, "Content-Type": "application/json"}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _chunked(self) -> bool:
            return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

        def _read(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_PUT = _any  # noqa: N815 - the names that http.server calls

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
