"""A Hugging Face hub on the loopback interface: real HTTP, repositories in memory, faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    """Files by revision. `token` is needed to see a private repository, or to read the files of a gated one."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> name -> content
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False


@dataclass
class Fault:
    """What happens to the next request whose 'METHOD path' contains `match`.

    `status` answers with an error; `cut` closes the connection after that many bytes; `hold` sends the headers and
    one byte, then nothing more until it is set; `trickle` sends a byte every 20 ms until it is set, so that no
    connection ever seems dead.
    """

    match: str
    status: int | None = None
    cut: int | None = None
    hold: threading.Event | None = None
    trickle: threading.Event | None = None


class HubServer:
    """Use as a context manager. `requests` lists what was asked: (method, path, token); `ranges` the Range headers of
    files, by path and in order."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.ranges: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        self._holds: list[threading.Event] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hold in self._holds:
            hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        branch: str = "main",
        token: str | None = None,
        gated: bool = False,
    ) -> str:
        """Store files as the newest commit of a branch, creating the repository; returns the commit's name."""
        repository = self.repositories.setdefault(repo_id, Repository())
        repository.token, repository.gated = token, gated
        digest = hashlib.sha1(repr((repo_id, branch, sorted(files.items()))).encode()).hexdigest()
        repository.files[digest] = dict(files)
        repository.branches[branch] = digest
        return digest

    def add_fault(self, match: str, times: int = 1, **what: Any) -> None:
        """See `Fault`."""
        with self._lock:
            self.faults += [Fault(match, **what) for _ in range(times)]
            self._holds += [what[name] for name in ("hold", "trickle") if what.get(name) is not None]

    def count(self, match: str) -> int:
        """How many requests had `match` in 'METHOD path'."""
        with self._lock:
            return sum(match in f"{method} {path}" for method, path, _ in self.requests)

    def next_fault(self, method: str, path: str, token: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path, token))
            for fault in self.faults:
                if fault.match in f"{method} {path}":
                    self.faults.remove(fault)
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self._token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self._fault = self.server_hub.next_fault(self.command, path, self._token)
        if self._fault is not None and self._fault.status is not None:
            self._send(self._fault.status, b"{}", {"Retry-After": "0"} if self._fault.status == 429 else {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._describe(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3])
        else:
            self._send(404, b"{}", {})

    def _find(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and commit; otherwise the error has been sent."""
        repository = self.server_hub.repositories.get(repo_id)
        hidden = repository is not None and repository.token is not None and not repository.gated
        if repository is None or (hidden and self._token != repository.token):
            self._send(404 if self._token else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.branches.get(revision, revision)
        if commit not in repository.files:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, commit

    def _describe(self, repo_id: str, revision: str) -> None:
        if (found := self._find(repo_id, revision)) is None:
            return
        repository, commit = found
        with_sizes = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = [
            {"rfilename": name, **({"size": len(data), "blobId": _etag(data)[:40]} if with_sizes else {})}
            for name, data in repository.files[commit].items()
        ]
        body = {
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit,
            "private": repository.token is not None and not repository.gated,
            "gated": "auto" if repository.gated else False,
            "siblings": siblings,
            "tags": [],
        }
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _tree(self, repo_id: str, revision: str) -> None:
        if (found := self._find(repo_id, revision)) is None:
            return
        repository, commit = found
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)[:40]}
            for name, data in repository.files[commit].items()
        ]
        self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        if (found := self._find(repo_id, revision)) is None:
            return
        repository, commit = found
        if repository.gated and self._token != repository.token:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        data = repository.files[commit].get(name)
        if data is None:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if self.command == "GET":
            self.server_hub.ranges.append((f"{repo_id}/{name}", self.headers.get("Range", "")))
        if start is None:
            self._send(200, data, headers)
        else:
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self._send(206, data[first:], headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        fault = self._fault
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut is not None:
            self.wfile.write(body[: fault.cut])
            self.close_connection = True
            return
        if fault is not None and fault.hold is not None:
            self.wfile.write(body[:1])
            self.wfile.flush()
            fault.hold.wait(120)
            body = body[1:]
        try:
            if fault is not None and fault.trickle is not None:
                while len(body) > 1 and not fault.trickle.wait(0.02):
                    self.wfile.write(body[:1])
                    body = body[1:]
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
