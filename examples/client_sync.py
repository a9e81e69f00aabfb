"""The blocking client: a whole answer, a stream, an adapter, and errors. Start a server first: make serve"""

from __future__ import annotations

import sys
from pathlib import Path

from lorax_triton import AdapterNotFoundError, Client, LoraxError

ADAPTERS = Path(__file__).resolve().parents[1] / "tests" / "data" / "adapters"
QUESTION = [{"role": "user", "content": "How do I make tea?"}]


def main(url: str) -> None:
    with Client(url) as client:
        answer = client.generate(messages=QUESTION, max_new_tokens=24)
        print("base:  ", answer.generated_text)
        assert answer.details is not None
        print(
            f"        {answer.details.generated_tokens} tokens, ended by {answer.details.finish_reason.value}"
        )

        print("pirate: ", end="")
        # Leaving the loop early would cancel the request on the server.
        for response in client.generate_stream(
            adapter_id=str(ADAPTERS / "pirate"), adapter_source="local", messages=QUESTION, max_new_tokens=24
        ):
            if not response.token.special:
                print(response.token.text, end="", flush=True)
        print()

        try:
            client.generate("Hello", adapter_id="/no/such/adapter", adapter_source="local")
        except AdapterNotFoundError as error:
            print("as expected:", error)

        print("adapters the server knows:", [adapter["id"] for adapter in client.adapters()])


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "localhost:8001")
    except LoraxError as error:
        sys.exit(f"{type(error).__name__}: {error}")
