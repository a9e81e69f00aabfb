"""LoRAX's own published client, unmodified, against the gateway.

It lives in an environment of its own, because it needs an older huggingface-hub than the server: made once and kept in
the user's cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from gateway_calls import GatewayCaller

pytestmark = [pytest.mark.triton, pytest.mark.slow]
VERSION = "0.6.3"


@pytest.fixture(scope="session")
def lorax_python() -> Path:
    """Python of an environment that holds `lorax-client` and what it needs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (
        cache / "lorax-triton" / f"lorax-client-{VERSION}-py{sys.version_info.major}{sys.version_info.minor}"
    )
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        result = subprocess.run(
            [
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                f"lorax-client=={VERSION}",
            ],
            capture_output=True,
            text=True,
        )
        if result.returncode != 0:
            pytest.fail(f"lorax-client {VERSION} cannot be installed:\n{result.stderr[-2000:]}")
        done.touch()
    return python


@pytest.fixture
def run_lorax(lorax_python: Path, gateway: GatewayCaller, gateway_adapter: str):
    """`run_lorax(code)` -> what the code leaves in `result`; it finds `client`, `url` and `adapter`."""

    def run(code: str) -> Any:
        program = (
            "import asyncio, json\n"
            "from lorax import AsyncClient, Client, MergedAdapters\n"
            "import lorax.errors as errors\n"
            f"url, adapter = {gateway.url!r}, {gateway_adapter!r}\n"
            "client = Client(url)\n" + textwrap.dedent(code) + "\nprint(json.dumps(result))\n"
        )
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        finished = subprocess.run(
            [str(lorax_python), "-c", program], capture_output=True, text=True, timeout=120, env=environment
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        return json.loads(finished.stdout.splitlines()[-1])

    return run


def test_generate_streams_adapters_and_errors_come_through_the_published_client(
    run_lorax, gateway: GatewayCaller, gateway_adapter: str
) -> None:
    # One process for all of it: starting Python with this client takes a second.
    result = run_lorax(
        """
        options = dict(max_new_tokens=6, ignore_eos_token=True)
        whole = client.generate("hello", **options)
        adapted = client.generate("hello", adapter_id=adapter, adapter_source="local", **options)
        stream = list(client.generate_stream("hello", **options))

        def failure(call):
            try:
                call()
            except Exception as error:
                return [type(error).__name__, str(error)]

        async def aio():
            other = AsyncClient(url)
            texts = [(await other.generate("hello", **options)).generated_text]
            async for response in other.generate_stream("hello", **options):
                last = response
            return texts + [last.generated_text]

        result = {
            "whole": whole.generated_text, "reason": whole.details.finish_reason.value,
            "count": whole.details.generated_tokens, "tokens": [token.id for token in whole.details.tokens],
            "adapted": adapted.generated_text,
            "streamed": [response.token.id for response in stream],
            "streamed_text": stream[-1].generated_text, "streamed_count": stream[-1].details.generated_tokens,
            "full": client.generate("hello", return_full_text=True, max_new_tokens=1).generated_text,
            "seeded": [client.generate("hello", do_sample=True, temperature=2.0, seed=7, **options).generated_text
                       for _ in range(2)],
            "too_long": failure(lambda: client.generate("hello", max_new_tokens=100000)),
            "no_adapter": failure(lambda: client.generate("hello", adapter_id="/no/such", adapter_source="local")),
            "stream_failure": failure(lambda: list(client.generate_stream("hello", max_new_tokens=100000))),
            "embed": failure(lambda: client.embed("hello")),
            "aio": asyncio.run(aio()),
        }
        """
    )
    direct = gateway.generate("hello", max_new_tokens=6, ignore_eos_token=True, details=True).json
    assert result["whole"] == result["streamed_text"] == direct["generated_text"]
    assert result["aio"] == [direct["generated_text"]] * 2
    assert result["tokens"] == result["streamed"] == [token["id"] for token in direct["details"]["tokens"]]
    assert (result["reason"], result["count"], result["streamed_count"]) == ("length", 6, 6)
    adapted = gateway.generate(
        "hello", max_new_tokens=6, ignore_eos_token=True, adapter_id=gateway_adapter
    ).json
    assert result["adapted"] == adapted["generated_text"] != result["whole"]
    assert result["full"].startswith("hello")
    assert result["seeded"][0] == result["seeded"][1]
    assert result["too_long"][0] == result["stream_failure"][0] == "ValidationError"
    assert "max_new_tokens" in result["too_long"][1]
    assert result["no_adapter"][0] == "NotFoundError"
    assert "/no/such" in result["no_adapter"][1]


def test_response_format_and_merged_adapters_reach_the_server(run_lorax) -> None:
    result = run_lorax(
        """
        def outcome(call):
            try:
                return ["text", call().generated_text]
            except Exception as error:
                return [type(error).__name__, str(error)]

        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        merged = MergedAdapters(ids=[adapter, adapter], weights=[0.5, 0.5], merge_strategy="linear", density=0.5)
        result = {
            "format": outcome(lambda: client.generate("hello", max_new_tokens=30,
                                                      response_format={"type": "json_object", "schema": schema})),
            "merged": outcome(lambda: client.generate("hello", max_new_tokens=3, merged_adapters=merged,
                                                      adapter_source="local")),
        }
        """
    )
    # Done, or refused by name; never ignored.
    kind, text = result["format"]
    assert (kind == "text" and text.lstrip().startswith("{")) or "response_format" in text
    kind, text = result["merged"]
    assert kind == "text" or "merged_adapters" in text


def test_the_guides_python_snippets_run_as_written(run_lorax) -> None:
    """Host, model and adapter ids aside, and with the prints collected."""
    printed = run_lorax(
        """
        import builtins
        print_lines = []
        original_print, builtins.print = print, lambda *values: print_lines.append(" ".join(map(str, values)))

        print(client.generate("one sentence on LoRA", max_new_tokens=32).generated_text)

        print(client.generate(
            "classify: urgent vs not urgent: 'Please reset my password'",
            max_new_tokens=32,
            adapter_id=adapter
        ).generated_text)

        # Prompt the base model
        print(client.generate("Tell me a joke.").generated_text)
        # Prompt a specific LoRA adapter
        adapter_id = adapter
        print(client.generate("Solve for X: 2x + 5 = 13", adapter_id=adapter_id).generated_text)
        builtins.print = original_print
        result = print_lines
        """
    )
    assert len(printed) == 4
    assert any(printed)
