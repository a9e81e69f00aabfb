"""`lorax-triton info` against a local HTTP server that answers as Triton does."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lorax_backend.cli.control import ServerUnreachableError, ask, info_rows, stats_rows
from lorax_backend.cli.main import main
from lorax_backend.types import EngineInfo, EngineStats

INFO = EngineInfo(
    model_id="org/model",
    model_type="llama",
    dtype="bfloat16",
    device="cuda:0",
    attention_backend="triton",
    lora_backend="triton",
    num_blocks=100,
    block_size=16,
    adapter_pages=64,
    adapter_page_rank=8,
    max_lora_rank=64,
    max_input_length=4095,
    max_total_tokens=4096,
    max_num_seqs=256,
    max_batch_tokens=8192,
    load_seconds=3.5,
    weight_bytes=3 << 30,
    kv_cache_bytes=1 << 20,
    adapter_arena_bytes=1 << 10,
    cuda_graph_batch_sizes=(1, 2, 4),
)
STATS = EngineStats(running=3, waiting=2, prompt_tokens=200, cached_prompt_tokens=50, generated_tokens=7)
Answer = Callable[[dict[str, Any]], tuple[int, Any]]


@pytest.fixture
def serve_answers() -> Iterator[Callable[[Answer], str]]:
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v2/models/lorax/generate"
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, body = answer(json.loads(request["control"]))
                payload = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def lorax_answer(command: dict[str, Any]) -> tuple[int, Any]:
    details = {"info": asdict(INFO), "stats": asdict(STATS)}[command["command"]]
    return 200, {"model_name": "lorax", "details": json.dumps(details)}


def test_info_prints_what_the_server_is_and_does(serve_answers, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--url", serve_answers(lorax_answer)]) == 0
    text = capsys.readouterr().out
    for part in (
        "org/model",
        "bfloat16",
        "100 blocks of 16 tokens",
        "3 running, 2 waiting",
        "25 % from the prefix",
    ):
        assert part in text


def test_info_as_json_holds_every_field(serve_answers, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", "--url", serve_answers(lorax_answer).removeprefix("http://")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(json.dumps({"info": asdict(INFO), "stats": asdict(STATS)}))


def test_nobody_listening_is_one_line_and_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--url", "http://127.0.0.1:9"]) == 1
    message = capsys.readouterr().err
    assert "no lorax-triton server answers at http://127.0.0.1:9" in message
    assert message.count("\n") == 1


def test_an_error_of_the_server_is_shown_without_its_wrapping(serve_answers) -> None:
    inner = json.dumps({"error": "the engine is gone", "error_type": "engine_dead"})
    url = serve_answers(lambda command: (503, {"error": f"in model: {inner}"}))
    with pytest.raises(ServerUnreachableError, match=r"answered 503: the engine is gone$"):
        ask(url, "info")


def test_a_server_of_another_kind_is_recognized(serve_answers) -> None:
    url = serve_answers(lambda command: (200, {"text_output": "hello"}))
    with pytest.raises(ServerUnreachableError, match="gave no details"):
        ask(url, "info")


def test_tables_leave_no_fact_unknown() -> None:
    assert "?" not in "".join(value for _, value in info_rows(asdict(INFO)))
    assert dict(info_rows(asdict(INFO)))["CUDA graphs"] == "batch sizes 1, 2, 4"
    assert dict(stats_rows(asdict(EngineStats())))["tokens"] == "0 prompt; 0 generated"


def test_a_port_that_does_not_speak_http_is_named_as_such() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_as_grpc_does() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"\x00\x00\x18\x04\x00\x00\x00\x00\x00\x00\x04\x00\x3f\xff\xff\r\n\r\n")

        thread = threading.Thread(target=answer_as_grpc_does)
        thread.start()
        try:
            with pytest.raises(ServerUnreachableError, match="does not speak HTTP; give Triton's HTTP port"):
                ask(f"127.0.0.1:{listener.getsockname()[1]}", "info")
        finally:
            thread.join(10)
