"""A Hugging Face hub on the loopback interface that serves adapter folders, each answer after a given delay."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@contextmanager
def local_hub(repositories: Mapping[str, Path], delay_s: float) -> Iterator[str]:
    """Serve `repositories` (`owner/name` -> folder), which may grow meanwhile; yields the address for HF_ENDPOINT."""

    class Handler(_Handler):
        folders = repositories
        delay = delay_s

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    folders: Mapping[str, Path]
    delay: float
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        time.sleep(self.delay)
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/.+)?", path):
            self._describe(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/([^/]+)", path):
            self._file(match[1], match[2])
        else:
            self._missing("EntryNotFound")

    def _describe(self, repository: str) -> None:
        folder = self.folders.get(repository)
        if folder is None:
            self._missing("RepoNotFound")
            return
        files = [{"rfilename": file.name, "size": file.stat().st_size} for file in sorted(folder.iterdir())]
        about = {
            "id": repository,
            "sha": _commit(repository),
            "private": False,
            "gated": False,
            "siblings": files,
        }
        body = json.dumps(about).encode()
        self._head(200, len(body), {"Content-Type": "application/json"})
        self.wfile.write(body)

    def _file(self, repository: str, name: str) -> None:
        file = self.folders.get(repository, Path("/nonexistent")) / name
        if not file.is_file():
            self._missing("EntryNotFound")
            return
        etag = hashlib.sha256(f"{repository}/{name}".encode()).hexdigest()
        self._head(200, file.stat().st_size, {"ETag": f'"{etag}"', "X-Repo-Commit": _commit(repository)})
        if self.command == "GET":
            with file.open("rb") as source:
                shutil.copyfileobj(source, self.wfile, 1 << 20)

    def _missing(self, code: str) -> None:
        self._head(404, 0, {"X-Error-Code": code})

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _commit(repository: str) -> str:
    return hashlib.sha1(repository.encode()).hexdigest()
