"""Many streams at once through the gateway, of which many are left in the middle: nothing may be left behind.

    python perf/gateway_soak.py --requests 1000 --streams 200 --output perf/results/gateway_soak-tiny-cpu.txt

Starts a tritonserver with a tiny random model and a gateway. Afterwards the server must hold no request, sequence or
KV block, the gateway no stream, file or growing memory, and the counts on /metrics must be those the callers saw.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environment import as_markdown, environment
from gateway_overhead import gateway_for, tiny_server
from stream_stats import percentile

from lorax_triton import Client

_SETTLE_S = 15.0


@dataclass
class Seen:
    """What the callers saw."""

    ends: Counter[str] = field(default_factory=Counter)
    tokens_of_whole_answers: int = 0
    first_token_ms: list[float] = field(default_factory=list)


async def one_stream(address: tuple[str, int], number: int, seen: Seen, dice: random.Random) -> None:
    """One request; a third is left after a few tokens, some before the first."""
    tokens = dice.randint(4, 60)
    leave_after = dice.choice([None, None, dice.randint(0, 20)])
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(*address)
    try:
        parameters = {"max_new_tokens": tokens, "ignore_eos_token": True}
        body = json.dumps({"inputs": f"{number} once upon a time", "parameters": parameters}).encode()
        head = "POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        count = 0
        while leave_after is None or count < leave_after:
            line = await reader.readline()
            if not line:
                break
            if line.startswith(b'data:{"token"'):
                if count == 0:
                    seen.first_token_ms.append(1e3 * (time.perf_counter() - started))
                count += 1
                if b'"generated_text":null' not in line:
                    seen.ends["whole"] += 1
                    seen.tokens_of_whole_answers += count
                    assert count == tokens, f"{count} tokens instead of {tokens}"
                    return
            elif line.startswith(b"data:"):
                seen.ends["error: " + json.loads(line[5:])["error_type"]] += 1
                return
        seen.ends["left by the caller"] += 1
    finally:
        writer.close()


async def load(address: tuple[str, int], requests: int, streams: int, seed: int) -> Seen:
    """`requests` requests, `streams` of them at once."""
    seen, dice, numbers = Seen(), random.Random(seed), iter(range(requests))

    async def worker() -> None:
        for number in numbers:
            await one_stream(address, number, seen, dice)

    await asyncio.gather(*(worker() for _ in range(streams)))
    return seen


def gateway_metrics(address: tuple[str, int]) -> dict[str, float]:
    """Samples without labels, and requests by route, of the gateway's page."""
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(\w\S*) (\S+)$", page, re.MULTILINE)}


def process_of(port: int) -> int:
    """The process that listens on a port of this machine."""
    want = f"{port:04X}"
    inodes = {
        fields[9]
        for fields in (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        if fields[1].endswith(":" + want) and fields[3] == "0A"
    }
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            links = [str(entry.readlink()) for entry in (folder / "fd").iterdir()]
        except OSError:
            continue
        if any(f"socket:[{inode}]" in links for inode in inodes):
            return int(folder.name)
    raise RuntimeError(f"nobody listens on port {port}")


def resources(pid: int) -> dict[str, int]:
    """Open files, threads and resident MiB of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    numbers = dict(re.findall(r"^(Threads|VmRSS):\s+(\d+)", status, re.MULTILINE))
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"files": files, "threads": int(numbers["Threads"]), "MiB": int(numbers["VmRSS"]) // 1024}


def settled(client: Client) -> dict[str, Any]:
    """The server's state once it holds nothing, or after a while what it still holds."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        state = {"live_requests": client.info()["live_requests"]}
        state |= {
            name: value
            for name, value in client.stats().items()
            if name in ("running", "waiting", "blocks_used")
        }
        if not any(state.values()) or time.monotonic() > deadline:
            return state


def soak(requests: int, streams: int) -> tuple[list[str], list[str]]:
    """Run it; (lines of the report, problems)."""
    lines, problems = [], []

    def expect(fact: bool, text: str) -> None:
        if not fact:
            problems.append(text)

    with tiny_server() as url, gateway_for(url) as address, Client(url) as client:
        pid = process_of(address[1])
        asyncio.run(
            load(address, min(requests, 2 * streams), streams, seed=0)
        )  # what is made once, is made now
        settled(client)
        before, metrics_before = resources(pid), gateway_metrics(address)
        started = time.perf_counter()
        seen = asyncio.run(load(address, requests, streams, seed=1))
        seconds = time.perf_counter() - started
        held = settled(client)
        after, metrics_after = resources(pid), gateway_metrics(address)
    grown = {name: metrics_after[name] - metrics_before.get(name, 0.0) for name in metrics_after}
    lines += [
        f"{requests} requests, {streams} at once, in {seconds:.1f} s: {dict(seen.ends)}",
        f"time to first token, ms (p50 / p99): {percentile(seen.first_token_ms, 0.5):.0f} / "
        f"{percentile(seen.first_token_ms, 0.99):.0f}",
        f"held by the server afterwards: {held}",
        f"the gateway's process before and after: {before}, {after}",
    ]
    names = (
        "lorax_gateway_disconnects_total",
        "lorax_gateway_generated_tokens_total",
        "lorax_gateway_streams_in_flight",
    )
    lines.append(f"counted by the gateway: { {name: grown[name] for name in names} }")
    served = grown['lorax_gateway_requests_total{route="generate_stream",status="2xx"}']
    expect(not any(held.values()), f"the server still holds {held}")
    expect(sum(seen.ends.values()) == requests, f"callers saw {sum(seen.ends.values())} ends")
    expect(not any(end.startswith("error") for end in seen.ends), f"errors: {seen.ends}")
    expect(served == requests, f"/metrics counts {served} streams, callers made {requests}")
    expect(metrics_after["lorax_gateway_streams_in_flight"] == 0, "streams are still counted as open")
    left, whole = grown["lorax_gateway_disconnects_total"], seen.ends["whole"]
    # An answer that was complete before its caller left counts as whole on the server.
    expect(left <= seen.ends["left by the caller"], f"/metrics counts {left} disconnects")
    expect(
        grown["lorax_gateway_generated_tokens_total"] >= seen.tokens_of_whole_answers,
        f"/metrics counts fewer tokens than the {seen.tokens_of_whole_answers} of {whole} whole answers",
    )
    expect(after["files"] <= before["files"] + 5, f"open files grew: {before} -> {after}")
    expect(after["threads"] <= before["threads"] + 2, f"threads grew: {before} -> {after}")
    expect(after["MiB"] <= before["MiB"] * 1.15 + 10, f"memory grew: {before} -> {after}")
    return lines, problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--output", type=Path, help="file for the result")
    arguments = parser.parse_args()
    facts = environment()
    lines, problems = soak(arguments.requests, arguments.streams)
    lines += [f"PROBLEM: {problem}" for problem in problems] or ["nothing was left behind"]
    result = f"# Soak through the gateway\n\n{as_markdown(facts)}\n\n" + "\n".join(lines) + "\n"
    print(result)
    if arguments.output:
        arguments.output.write_text(result)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
