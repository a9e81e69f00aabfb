"""Every Python example of docs/client.md and the README runs as written, but for host, keys and adapter."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from triton_calls import TritonCaller

from lorax_backend.cli.main import main
from lorax_backend.server.launch import TritonServer

pytestmark = pytest.mark.triton

ROOT = Path(__file__).parents[2]
KEY = "the server's key"
README_EXAMPLE = 'client = Client("localhost:8001")'


def blocks(file: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text(), re.S | re.M)


def test_the_guides_examples_run_as_written(
    start_tiny: Callable[..., tuple[TritonServer, TritonCaller]],
    tiny_adapters: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, _ = start_tiny(admin_api_key=KEY, engine_process="false")

    def adapt(text: str) -> str:
        text = text.replace(
            '"localhost:8001"', f'"{server.grpc_address}", metrics_url="{server.metrics_address}"'
        )
        return text.replace("some-org/some-adapter", tiny_adapters[0])

    examples = blocks(ROOT / "docs" / "client.md", "python")
    assert len(examples) >= 7
    readme = [text for text in blocks(ROOT / "README.md", "python") if README_EXAMPLE in text]
    assert len(readme) == 1
    for file, texts in (("docs/client.md", examples), ("README.md", readme)):
        names: dict[str, Any] = {}
        for text in texts:
            exec(compile(adapt(text), file, "exec"), names)
        for name in ("client", "admin"):
            if name in names:
                names[name].close()
    capsys.readouterr()

    monkeypatch.setenv("LORAX_ADMIN_KEY", KEY)
    (commands,) = [text for text in blocks(ROOT / "docs" / "client.md", "bash") if "adapters list" in text]
    for line in commands.splitlines()[1:]:
        words = adapt(line).split()
        assert main([*words[1:], "--url", server.grpc_address]) == 0, (line, capsys.readouterr().err)
