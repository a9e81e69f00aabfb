"""Clients that nobody here wrote, and the oldest of the official package's 1.x line, each in an environment of its own.

The environments are made once and kept in the user's cache, because their packages do not go together with ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

CLIENT = Path(__file__).parents[2] / "client"
OLDEST_PROGRAM = Path(__file__).parent / "oldest_openai_program.py"
OLDEST = ("openai==1.0.0", "httpx<0.28", "pydantic>=2", "tritonclient[grpc]>=2.50", "numpy<2")
LANGCHAIN = ("langchain-openai>=1.0",)
LLM = ("llm>=0.27",)

pytestmark = pytest.mark.slow

Run = Callable[..., str]


def environment(packages: tuple[str, ...]) -> Path:
    """The python of an environment with these packages."""
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "lorax-triton"
        / "test-environments"
    )
    key = hashlib.sha256(repr((packages, sys.version_info[:3])).encode()).hexdigest()[:12]
    folder = cache / key
    python, mark = folder / "bin" / "python", folder / "complete"
    if not mark.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", *packages],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.fail(f"the environment of {packages} could not be made: {done.stderr[-2000:]}")
        mark.touch()
    return python


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run(packages, program or arguments, **environ)` -> what it prints."""

    def start(packages: tuple[str, ...], *arguments: str, **environ: str) -> str:
        python = environment(packages)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI", "LLM"))}
        done = subprocess.run(
            [str(python), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env=kept | {"PYTHONPATH": "", **environ},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return start


def expected(client: openai.OpenAI, **fields: Any) -> str:
    """What the newest official package gets."""
    answer = client.chat.completions.create(
        model="", messages=[{"role": "user", "content": "Hi"}], temperature=0, max_tokens=8, **fields
    )
    return str(answer.choices[0].message.content)


def test_the_oldest_package_of_the_1_line_gets_the_same_over_http_and_grpc(
    run: Run, ways: Any, http_client: openai.OpenAI, adapter: str, tiny_model: str
) -> None:
    arguments = (ways.http, ways.grpc, adapter, tiny_model)
    told = json.loads(run(OLDEST, str(OLDEST_PROGRAM), *arguments, PYTHONPATH=str(CLIENT)))
    assert told.pop("version") == "1.0.0"
    text = expected(http_client)
    assert told.pop("retries") == [3, 1]
    assert told.pop("module") == text
    for name in ("chats", "chat_streams", "raw_responses", "headers_and_copies"):
        assert told[name] == [text] * 2, name
    assert told["asynchronous"] == [[text] * 4] * 2
    assert [param for param, _ in told["errors"][0]] == [
        "model", "temperature", "messages", "messages", "functions", "suffix", "top_p", "model", None, None,
    ]  # fmt: skip
    for name, (over_http, over_grpc) in told.items():
        assert over_http == over_grpc, name


LANGCHAIN_PROGRAM = """
import json, sys
from langchain_openai import ChatOpenAI

address = {"model": sys.argv[2], "base_url": sys.argv[1], "api_key": "EMPTY"}
chat = ChatOpenAI(**address, temperature=0, max_tokens=8, stream_usage=True)
answer = chat.invoke("Hi")
chunks = list(chat.stream("Hi"))
streamed = chunks[0]
for chunk in chunks[1:]:
    streamed = streamed + chunk
parameters = {"type": "object", "properties": {"a": {"type": "integer"}}}
bound = chat.bind_tools([{"title": "add", "description": "Adds.", **parameters}])
print(json.dumps({
    "whole": answer.content, "streamed": streamed.content, "usage": answer.usage_metadata["output_tokens"],
    "streamed_usage": streamed.usage_metadata["output_tokens"], "calls": bound.invoke("Hi").tool_calls,
    "reason": answer.response_metadata["finish_reason"], "pieces": len(chunks),
}))
"""


def test_langchains_chat_completes_and_streams(
    run: Run, ways: Any, http_client: openai.OpenAI, tiny_model: str
) -> None:
    told = json.loads(run(LANGCHAIN, "-c", LANGCHAIN_PROGRAM, ways.http, tiny_model))
    text = expected(http_client)
    assert told["whole"] == told["streamed"] == text
    assert told["usage"] == told["streamed_usage"] > 0
    assert told["calls"] == []
    assert told["pieces"] > 2


def test_the_llm_command_completes_and_streams(
    run: Run, ways: Any, http_client: openai.OpenAI, tiny_model: str, tmp_path: Path
) -> None:
    model = {"model_id": "ours", "model_name": tiny_model, "api_base": ways.http}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    text = expected(http_client).strip()
    options = ("-m", "llm", "-m", "ours", "-o", "temperature", "0", "-o", "max_tokens", "8", "Hi", "--no-log")
    for arguments in (options, (*options, "--no-stream")):
        assert run(LLM, *arguments, LLM_USER_PATH=str(tmp_path)).strip() == text
