"""Load a server through Triton's gRPC with perf_analyzer, with an adapter named in every request.

    python perf/triton_load.py                             starts a server with SmolLM2 and the example adapters
    python perf/triton_load.py --url HOST:8001 --adapters org/a,org/b --adapter-source hub

For each concurrency it prints perf_analyzer's own table and ours (time to first token, time between tokens, tokens a
second); --output keeps both in a file, with hardware, versions and commands.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from environment import as_markdown, environment
from perf_analyzer import PerfAnalyzerError, find_perf_analyzer
from stream_stats import Stream, Summary, markdown_table, read_streams, summarize

_ROOT = Path(__file__).resolve().parent.parent
_EXAMPLE_ADAPTERS = _ROOT / "tests" / "data" / "adapters"
_WORDS = ("river", "stone", "lantern", "orchard", "copper", "window", "valley", "harbour", "meadow", "engine")


@dataclass(frozen=True, slots=True)
class Load:
    """What to send. Requests name `adapters` in turn; an empty name is the base model."""

    adapters: tuple[str, ...]
    adapter_source: str
    prompt_words: int
    max_tokens: int


def request_rows(load: Load, count: int) -> list[dict[str, list[object]]]:
    """`count` rows of perf_analyzer's --input-data. Prompts differ, so that no request finds its own in the prefix
    cache; adapters take turns."""
    rows: list[dict[str, list[object]]] = []
    for index in range(count):
        adapter = load.adapters[index % len(load.adapters)]
        words = (_WORDS[(7 * index + 3 * place) % len(_WORDS)] for place in range(load.prompt_words))
        row: dict[str, list[object]] = {
            "text_input": [f"Story {index}: " + " ".join(words)],
            "stream": [True],
            "max_tokens": [load.max_tokens],
            "return_token_ids": [True],
            # Equal lengths, so that runs can be compared.
            "sampling_parameters": [json.dumps({"ignore_eos_token": True})],
        }
        if adapter:
            row |= {"adapter_id": [adapter], "adapter_source": [load.adapter_source]}
        rows.append(row)
    return rows


@dataclass(frozen=True, slots=True)
class Run:
    """One call of perf_analyzer."""

    concurrency: int
    command: str
    table: str
    streams: list[Stream]


def run_perf_analyzer(url: str, load: Load, concurrency: int, requests: int) -> Run:
    """Run one concurrency level.

    Raises:
        PerfAnalyzerError: perf_analyzer cannot be had, or it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, export = Path(folder, "requests.json"), Path(folder, "profile.json")
        data.write_text(json.dumps({"data": request_rows(load, requests + len(load.adapters))}))
        options = [
            *("-m", "lorax", "-i", "grpc", "-u", url, "--async", "--streaming"),
            *("--input-data", str(data), "--profile-export-file", str(export)),
            *("--concurrency-range", str(concurrency), "--request-count", str(requests)),
            *("--warmup-request-count", str(len(load.adapters)), "--stability-percentage", "999"),
        ]
        done = subprocess.run([*find_perf_analyzer(), *options], capture_output=True, text=True)
        if done.returncode != 0 or not export.is_file():
            raise PerfAnalyzerError(f"perf_analyzer failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        streams = [stream for experiment in read_streams(export) for stream in experiment]
    shown = [option.replace(folder + "/", "") for option in options]
    return Run(concurrency, shlex.join(["perf_analyzer", *shown]), done.stdout.strip(), streams)


@contextmanager
def own_server(model_id: str, max_batch_size: int) -> Iterator[str]:
    """A server of our own on free ports, ended when the block is left; its gRPC address."""
    from lorax_backend.config import load_config
    from lorax_backend.model_source import resolve_model
    from lorax_backend.server.launch import ServerOptions, TritonServer
    from lorax_backend.server.repository import write_repository

    parameters = {"model_id": model_id, "max_batch_size": str(max_batch_size)}
    resolve_model(load_config(parameters), print)
    with tempfile.TemporaryDirectory() as folder:
        server = TritonServer(write_repository(Path(folder), parameters), ServerOptions(models=("lorax",)))
        with server:
            server.wait_ready()
            yield server.grpc_address


def groups(run: Run) -> list[tuple[str, Summary]]:
    """Summaries of a run: all streams, then those without and those with an adapter."""
    parts = {
        "all": run.streams,
        "base model": [stream for stream in run.streams if not stream.adapter],
        "with adapters": [stream for stream in run.streams if stream.adapter],
    }
    label = f"{run.concurrency} at once"
    return [(f"{label}, {name}", summarize(part)) for name, part in parts.items() if part]


def report(title: str, facts: dict[str, str], runs: list[Run]) -> str:
    """The result file."""
    table = markdown_table(row for run in runs for row in groups(run))
    raw = "\n\n".join(
        f"### {run.concurrency} at once\n\n`{run.command}`\n\n```\n{run.table}\n```" for run in runs
    )
    return (
        f"# {title}\n\n{as_markdown(facts)}\n\nLatencies in milliseconds as p50 / p90 / p99. Requests with and without "
        "an adapter ran\nside by side in the same batches; their tokens/s are shares of the whole.\n\n"
        f"{table}\n\n"
        f"## perf_analyzer's own tables\n\nIts latency is that of whole requests.\n\n{raw}\n"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="gRPC address of a running server; without it, one is started")
    parser.add_argument("--model-id", default="smollm2", help="model of the server that is started [smollm2]")
    parser.add_argument("--adapters", help="comma-separated adapter ids; default: the example adapters")
    parser.add_argument("--adapter-source", default="local")
    parser.add_argument("--no-base", action="store_true", help="send no requests without an adapter")
    parser.add_argument("--concurrency", default="1,4,8", help="comma-separated [1,4,8]")
    parser.add_argument("--requests", type=int, default=32, help="requests measured at each concurrency [32]")
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, help="file for the result, such as perf/results/NAME.md")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    names = (arguments.adapters or ",".join(map(str, sorted(_EXAMPLE_ADAPTERS.iterdir())))).split(",")
    load = Load(
        adapters=tuple(names if arguments.no_base else ["", *names]),
        adapter_source=arguments.adapter_source,
        prompt_words=arguments.prompt_words,
        max_tokens=arguments.max_tokens,
    )
    levels = [int(text) for text in arguments.concurrency.split(",")]
    facts = environment()
    runs = []
    try:
        find_perf_analyzer()
        with _server(arguments, max(levels)) as url:
            for level in levels:
                run = run_perf_analyzer(url, load, level, arguments.requests)
                print(run.table, "", markdown_table(groups(run)), "", sep="\n", flush=True)
                runs.append(run)
    except PerfAnalyzerError as error:
        print(f"triton_load: {error}", file=sys.stderr)
        return 1
    if arguments.output:
        adapters = len(set(load.adapters) - {""})
        title = f"perf_analyzer over gRPC: {arguments.model_id}, {adapters} adapters, {load.max_tokens} tokens each"
        arguments.output.write_text(report(title, facts, runs))
    return 0


@contextmanager
def _server(arguments: argparse.Namespace, streams: int) -> Iterator[str]:
    if arguments.url:
        yield arguments.url
    else:
        with own_server(arguments.model_id, max(streams, 8)) as url:
            yield url


if __name__ == "__main__":
    sys.exit(main())
