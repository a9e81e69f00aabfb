"""The tokenizer of the ensemble: whose chat template it uses, and for whom it has none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorax_backend.adapters.sources.local import LocalSource
from lorax_backend.config import ServerConfig
from lorax_backend.errors import AdapterNotFoundError, UnsupportedError
from lorax_backend.serving.given import RawRequest
from lorax_backend.serving.prompt_tokenizer import PromptTokenizer
from lorax_backend.serving.tokenizer import TokenizerPool

CHAT = {"messages": '[{"role": "user", "content": "hi"}]'}
Make = Callable[..., PromptTokenizer]


@pytest.fixture
def make(byte_level: TokenizerPool) -> Iterator[Make]:
    made: list[PromptTokenizer] = []

    def build(**options: Any) -> PromptTokenizer:
        sources = {"local": LocalSource()}
        made.append(PromptTokenizer(ServerConfig(**options), byte_level, lambda: sources))
        return made[-1]

    yield build
    for tokenizer in made:
        tokenizer.close()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("own:{{ messages[0].content }}")
    return tmp_path


def test_c22_a_local_adapters_own_template_is_used(
    make: Make, byte_level: TokenizerPool, adapter: Path
) -> None:
    tokenizer = make(default_adapter_source="local", adapter_aliases=json.dumps({"mine": str(adapter)}))
    own = byte_level.encode("own:hi", False)
    base = byte_level.encode(byte_level.render_chat([{"role": "user", "content": "hi"}]), False)
    assert tokenizer.encode(RawRequest("", CHAT | {"adapter_id": str(adapter)}, {})) == own
    assert tokenizer.encode(RawRequest("", CHAT | {"lora_name": "mine"}, {})) == own
    assert tokenizer.encode(RawRequest("", CHAT, {"adapter_id": str(adapter)})) == own
    assert tokenizer.encode(RawRequest("", CHAT, {})) == base
    (adapter / "chat_template.jinja").unlink()
    assert tokenizer.encode(RawRequest("", CHAT | {"adapter_id": str(adapter)}, {})) == base, "it looks again"
    with pytest.raises(AdapterNotFoundError):
        tokenizer.encode(RawRequest("", CHAT | {"adapter_id": str(adapter / "none")}, {}))


def test_a_chat_for_an_adapter_from_elsewhere_is_refused_with_the_way_out(
    make: Make, byte_level: TokenizerPool
) -> None:
    tokenizer = make()
    with pytest.raises(UnsupportedError, match=r"hub:org/a may have .* to the model lorax"):
        tokenizer.encode(RawRequest("", CHAT | {"adapter_id": "org/a"}, {}))
    plain = RawRequest("", {"text_input": "hi", "adapter_id": "org/a"}, {})
    assert tokenizer.encode(plain) == byte_level.encode("hi")
