"""moto's S3 on the loopback interface, over real HTTP, and faults put in front of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


@dataclass
class S3Fault:
    """What happens to the next request whose 'METHOD path' contains `match`: an error status, a body cut short after
    `cut` bytes, one whose last byte is another (`garble`), a wait for `hold` before it is answered, `first` called
    before that, or a body that comes a byte every 20 ms until `trickle` is set, so that no connection ever seems
    dead."""

    match: str
    status: int | None = None
    cut: int | None = None
    garble: bool = False
    hold: threading.Event | None = None
    trickle: threading.Event | None = None
    first: Callable[[], object] | None = None


class S3Server:
    """Use as a context manager. `requests` lists 'METHOD path?query' and the Range header of what was asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.faults: list[S3Fault] = []
        self._lock = threading.Lock()
        self._events: list[threading.Event] = []
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> S3Server:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for event in self._events:
            event.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    @property
    def client(self) -> Any:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )

    def put(self, bucket: str, prefix: str, files: Mapping[str, bytes]) -> None:
        """Store files under prefix/, creating the bucket."""
        client = self.client
        client.create_bucket(Bucket=bucket)
        for name, data in files.items():
            client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=data)

    def reset(self) -> None:
        """Forget everything but the server itself."""
        from moto.moto_api._internal import moto_api_backend

        moto_api_backend.reset()
        self.requests.clear()
        self.faults.clear()

    def add_fault(self, match: str, times: int = 1, **what: Any) -> None:
        """See `S3Fault`."""
        with self._lock:
            self.faults += [S3Fault(match, **what) for _ in range(times)]
            self._events += [what[name] for name in ("hold", "trickle") if what.get(name) is not None]

    def count(self, match: str) -> int:
        """How many requests had `match` in 'METHOD path?query'."""
        with self._lock:
            return sum(match in line for line, _ in self.requests)

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        line = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        with self._lock:
            self.requests.append((line, environ.get("HTTP_RANGE", "")))
            fault = next((fault for fault in self.faults if fault.match in line), None)
            if fault is not None:
                self.faults.remove(fault)
        if fault is None:
            return self._application(environ, start_response)
        if fault.first is not None:
            fault.first()
        if fault.hold is not None:
            fault.hold.wait(30)
        if fault.status is not None:
            start_response(f"{fault.status} fault", [("Content-Length", "0")])
            return [b""]
        body = b"".join(self._application(environ, start_response))
        if fault.trickle is not None:
            return _trickle(body, fault.trickle)
        if fault.garble:
            body = body[:-1] + bytes([body[-1] ^ 1])
        return [body[: fault.cut]]


def _trickle(body: bytes, enough: threading.Event) -> Iterator[bytes]:
    for index in range(len(body)):
        if enough.wait(0.02):
            yield body[index:]
            return
        yield body[index : index + 1]
