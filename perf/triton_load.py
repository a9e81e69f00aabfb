"""Load a server through Triton's gRPC with perf_analyzer, with an adapter named in every request.

    python perf/triton_load.py                             starts a server with SmolLM2 and the example adapters
    python perf/triton_load.py --url HOST:8001 --adapters org/a,org/b --adapter-source hub
    python perf/triton_load.py --shape llama3-8b --concurrency 1,32,128 --requests 256 --max-tokens 128

The last one is for a GPU: random weights of a real model's shape, and --random-adapters of rank 16 beside the base
model. --perf-analyzer names a binary or a wheel, where there is no network.

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
    vocab_size: int = 0  # of a random model, one word a token; 0: a model that reads English

    def prompt(self, index: int) -> str:
        """Different for every index, so that no request finds its own in the prefix cache."""
        places = range(self.prompt_words)
        if self.vocab_size:
            # Multipliers without a common divisor spread the words over the vocabulary.
            return " ".join(f"w{2 + (7919 * index + 31 * place) % (self.vocab_size - 2)}" for place in places)
        return f"Story {index}: " + " ".join(
            _WORDS[(7 * index + 3 * place) % len(_WORDS)] for place in places
        )


def request_rows(load: Load, count: int) -> list[dict[str, list[object]]]:
    """`count` rows of perf_analyzer's --input-data. Prompts differ; adapters take turns."""
    rows: list[dict[str, list[object]]] = []
    for index in range(count):
        adapter = load.adapters[index % len(load.adapters)]
        row: dict[str, list[object]] = {
            "text_input": [load.prompt(index)],
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


def run_perf_analyzer(
    url: str, load: Load, concurrency: int, requests: int, perf_analyzer: Path | None = None
) -> Run:
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
        done = subprocess.run([*find_perf_analyzer(perf_analyzer), *options], capture_output=True, text=True)
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


@contextmanager
def random_server(
    shape: str, adapters: int, streams: int, host_gib: float
) -> Iterator[tuple[str, list[str], int]]:
    """A server of our own with a random model of that shape; its gRPC address, the folders of as many adapters of rank
    16, and the size of the vocabulary."""
    from gpu_models import SHAPES, host_bytes, write_adapters, write_model, write_tokenizer
    from gpu_server import server

    with tempfile.TemporaryDirectory(prefix="lorax-perf-") as folder:
        vocab = SHAPES[shape]["vocab_size"]
        model = write_model(Path(folder) / f"random-{shape}", shape)
        write_tokenizer(model, vocab)
        names = write_adapters(Path(folder) / "adapters", SHAPES[shape], [16] * adapters)
        options = {"max_batch_size": streams, "adapter_pages": 2 * adapters + 8,
                   "adapter_host_bytes": host_bytes(names, host_gib)}  # fmt: skip
        with server(model, **options) as running:
            yield running.grpc_address, names, vocab


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
    parser.add_argument(
        "--shape", help="serve random weights of this shape, such as llama3-8b, llama3-1b or tiny"
    )
    parser.add_argument(
        "--random-adapters", type=int, default=64, help="with --shape: adapters of rank 16 [64]"
    )
    parser.add_argument(
        "--host-gib", type=float, default=3.0, help="with --shape: host memory for adapters [3]"
    )
    parser.add_argument(
        "--perf-analyzer", type=Path, metavar="PATH", help="binary or wheel; default: PATH, else fetched"
    )
    parser.add_argument("--output", type=Path, help="file for the result, such as perf/results/NAME.md")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    levels = [int(text) for text in arguments.concurrency.split(",")]
    facts = environment()
    runs = []
    try:
        find_perf_analyzer(arguments.perf_analyzer)
        with _server(arguments, max(levels)) as (url, names, vocab):
            load = Load(
                adapters=tuple(names if arguments.no_base else ["", *names]),
                adapter_source=arguments.adapter_source,
                prompt_words=arguments.prompt_words,
                max_tokens=arguments.max_tokens,
                vocab_size=vocab,
            )
            for level in levels:
                run = run_perf_analyzer(url, load, level, arguments.requests, arguments.perf_analyzer)
                print(run.table, "", markdown_table(groups(run)), "", sep="\n", flush=True)
                runs.append(run)
    except PerfAnalyzerError as error:
        print(f"triton_load: {error}", file=sys.stderr)
        return 1
    if arguments.output:
        adapters = len(set(load.adapters) - {""})
        model = (arguments.shape and f"random weights, {arguments.shape}") or arguments.model_id
        title = f"perf_analyzer over gRPC: {model}, {adapters} adapters, {load.max_tokens} tokens each"
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report(title, facts, runs))
    return 0


@contextmanager
def _server(arguments: argparse.Namespace, streams: int) -> Iterator[tuple[str, list[str], int]]:
    """Address, adapters and, for a random model, the size of its vocabulary."""
    names = (arguments.adapters or ",".join(map(str, sorted(_EXAMPLE_ADAPTERS.iterdir())))).split(",")
    if arguments.url:
        yield arguments.url, names, 0
    elif arguments.shape:
        streams = max(streams, 8)
        with random_server(arguments.shape, arguments.random_adapters, streams, arguments.host_gib) as found:
            yield found
    else:
        with own_server(arguments.model_id, max(streams, 8)) as url:
            yield url, names, 0


if __name__ == "__main__":
    sys.exit(main())
