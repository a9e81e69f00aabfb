"""The asynchronous client: many answers at once from one task each. Start a server first: make serve"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from lorax_triton import AsyncClient, LoraxError

ADAPTERS = Path(__file__).resolve().parents[1] / "tests" / "data" / "adapters"
QUESTION = [{"role": "user", "content": "How do I make tea?"}]


async def ask(client: AsyncClient, name: str) -> str:
    """The streamed answer of one adapter ("" is the base model), as soon as it is 24 tokens long."""
    text = ""
    async with client.generate_stream(
        adapter_id=str(ADAPTERS / name) if name else None,
        adapter_source="local" if name else None,
        messages=QUESTION,
        max_new_tokens=24,
    ) as stream:
        async for response in stream:
            if not response.token.special:
                text += response.token.text
    return text


async def main(url: str) -> None:
    names = ["", "pirate", "shout", "tag-falcon"]
    async with AsyncClient(url, timeout=30) as client:
        for name, text in zip(
            names, await asyncio.gather(*(ask(client, name) for name in names)), strict=True
        ):
            print(f"{name or 'base':>10}: {text}")


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "localhost:8001"))
    except LoraxError as error:
        sys.exit(f"{type(error).__name__}: {error}")
