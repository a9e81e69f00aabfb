"""Chat requests for the tests of `/v1/chat/completions`.

`answer` and `text` ask through the official package, whichever way it takes; `sampling` shows what the server is asked.
"""

from __future__ import annotations

from typing import Any

import openai
from fakes_openai import USER, ScriptedBackend, chat


def answer(client: openai.OpenAI, **fields: Any) -> Any:
    """A greedy chat answer of a few tokens."""
    values = {"model": "", "messages": USER, "max_tokens": 12, "temperature": 0, **fields}
    return client.chat.completions.create(**values)


def text(client: openai.OpenAI, **fields: Any) -> str:
    return str(answer(client, **fields).choices[0].message.content)


def sampling(**fields: Any) -> dict[str, Any]:
    """The sampling parameters that the server is sent for a chat request."""
    backend = ScriptedBackend()
    told = chat(backend, **fields)
    assert told.status == 200, told.json
    return backend.call.sampling
