"""What the HTTP gateway costs against direct gRPC, both measured in one run on one server.

    python perf/gateway_overhead.py --output perf/results/gateway_overhead-cpu.md

Starts a tritonserver and a gateway in front of it. Requests to the two take turns, so that whatever else the machine
does falls on both. Then the time from a caller's disconnect until the server holds nothing for it any more.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from environment import as_markdown, environment
from stream_stats import percentile
from triton_load import own_server

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # for the tiny model

from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.process import GatewayProcess
from lorax_triton import AsyncClient, Client

_PROMPT = "The lantern stood in the window of the house by the river, and every evening"


@contextmanager
def gateway_for(url: str) -> Iterator[tuple[str, int]]:
    """A gateway process in front of a server; where it listens."""
    config = GatewayConfig(triton_urls=(url,), host="127.0.0.1", port=0)
    gateway = GatewayProcess(config, print, lambda: print("the gateway died", file=sys.stderr))
    gateway.start()
    host, _, port = gateway.address.rpartition("://")[2].rpartition(":")
    try:
        yield host, int(port)
    finally:
        gateway.drain(10.0)


def _body(prompt: str, tokens: int) -> bytes:
    parameters = {"max_new_tokens": tokens, "ignore_eos_token": True}
    return json.dumps({"inputs": prompt, "parameters": parameters}).encode()


def first_token_times(url: str, address: tuple[str, int], rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token, directly and through the gateway, taking turns."""
    direct, through = [], []
    connection = http.client.HTTPConnection(*address)
    with Client(url) as client:
        for index in range(rounds):
            # Different from the start, so that none finds another's prompt in the prefix cache.
            started = time.perf_counter()
            stream = client.generate_stream(f"{2 * index} {_PROMPT}", max_new_tokens=2, ignore_eos_token=True)
            next(stream)
            direct.append(1e3 * (time.perf_counter() - started))
            for _ in stream:
                pass
            started = time.perf_counter()
            headers = {"content-type": "application/json"}
            connection.request("POST", "/generate_stream", _body(f"{2 * index + 1} {_PROMPT}", 2), headers)
            response = connection.getresponse()
            response.readline()
            through.append(1e3 * (time.perf_counter() - started))
            response.read()
    connection.close()
    return direct[5:], through[5:]  # the first warm up


async def _direct(client: AsyncClient, prompt: str, tokens: int) -> int:
    return len(
        [None async for _ in client.generate_stream(prompt, max_new_tokens=tokens, ignore_eos_token=True)]
    )


async def _through(address: tuple[str, int], prompt: str, tokens: int) -> int:
    reader, writer = await asyncio.open_connection(*address)
    body = _body(prompt, tokens)
    head = (
        "POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    return answer.count(b'data:{"token"')


async def tokens_per_s(run: Callable[[str], Awaitable[int]], streams: int, rounds: int, label: str) -> float:
    """Tokens a second of `streams` at once, `rounds` times each."""
    started = time.perf_counter()

    async def worker(number: int) -> int:
        return sum([await run(f"{label} {number} {turn}: {_PROMPT}") for turn in range(rounds)])

    counts = await asyncio.gather(*(worker(number) for number in range(streams)))
    return sum(counts) / (time.perf_counter() - started)


async def throughput(
    url: str, address: tuple[str, int], levels: list[int], tokens: int
) -> list[tuple[int, float, float]]:
    """(streams, tokens/s directly, tokens/s through the gateway); the two take turns at every level."""
    rows: list[tuple[int, float, float]] = []
    async with AsyncClient(url, timeout=600.0) as client:
        for streams in levels:
            direct, through = [], []
            for turn in range(3):
                rounds = max(1, 16 // streams)
                direct.append(
                    await tokens_per_s(
                        lambda prompt: _direct(client, prompt, tokens), streams, rounds, f"d{turn}"
                    )
                )
                through.append(
                    await tokens_per_s(
                        lambda prompt: _through(address, prompt, tokens), streams, rounds, f"t{turn}"
                    )
                )
            rows.append((streams, percentile(direct, 0.5), percentile(through, 0.5)))
            print(
                f"{streams} streams: {rows[-1][1]:.0f} tokens/s directly, {rows[-1][2]:.0f} through",
                flush=True,
            )
    return rows


def disconnect_times(url: str, address: tuple[str, int], rounds: int) -> list[float]:
    """Milliseconds from closing a stream's connection until the server has no live request any more."""
    times = []
    with Client(url) as client:
        for _ in range(rounds):
            connection = http.client.HTTPConnection(*address)
            headers = {"content-type": "application/json"}
            connection.request("POST", "/generate_stream", _body(_PROMPT, 1000), headers)
            response = connection.getresponse()
            response.readline()
            response.close()
            connection.close()
            started = time.perf_counter()
            while client.info()["live_requests"]:
                pass
            times.append(1e3 * (time.perf_counter() - started))
    return times


def _spread(values: list[float]) -> str:
    return " / ".join(f"{percentile(values, share):.2f}" for share in (0.5, 0.9, 0.99))


@contextmanager
def tiny_server() -> Iterator[str]:
    """A server of a random model whose steps take little beside what is measured here; its gRPC address."""
    from tiny_checkpoints import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder), "llama", max_position_embeddings=4096)
        with own_server(str(model), 64) as url:
            yield url


def measure(arguments: argparse.Namespace) -> str:
    """Run everything; the result file."""
    facts = environment()
    levels = [int(text) for text in arguments.concurrency.split(",")]
    server = tiny_server() if arguments.model_id == "tiny" else own_server(arguments.model_id, 64)
    with server as url, gateway_for(url) as address:
        direct, through = first_token_times(url, address, arguments.rounds)
        added = percentile(through, 0.5) - percentile(direct, 0.5)
        lines = [
            "## Time to first token, one stream, milliseconds (p50 / p90 / p99)",
            "",
            f"- direct gRPC: {_spread(direct)}",
            f"- through the gateway: {_spread(through)}",
            f"- added at the median: {added:.2f} (target: less than 2)",
        ]
        print("\n".join(lines), flush=True)
        gone = disconnect_times(url, address, 30)
        lines += [
            "",
            "## From a caller's disconnect to nothing held for it, milliseconds (p50 / p90 / p99)",
            "",
            f"{_spread(gone)} (target: 100; the server looks for cancellations every 50 ms)",
        ]
        print("\n".join(lines[-3:]), flush=True)
        rows = asyncio.run(throughput(url, address, levels, arguments.max_tokens))
    lines += [
        "",
        f"## Tokens a second, {arguments.max_tokens} tokens a stream, median of 3 turns",
        "",
        "The callers, the gateway and the CPU engine share the cores.",
        "",
        "| streams | direct gRPC | gateway | share |",
        "|---|---|---|---|",
        *(f"| {streams} | {one:.0f} | {two:.0f} | {two / one:.2f} |" for streams, one, two in rows),
    ]
    title = f"# The gateway against direct gRPC: {arguments.model_id}"
    return f"{title}\n\n{as_markdown(facts)}\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-id", default="tiny", help="model of the server; tiny: a random one [tiny]")
    parser.add_argument(
        "--rounds", type=int, default=200, help="requests of each kind for time to first token [200]"
    )
    parser.add_argument("--concurrency", default="1,8,32,64", help="streams at once [1,8,32,64]")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, help="file for the result")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(result)
    if arguments.output:
        arguments.output.write_text(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
