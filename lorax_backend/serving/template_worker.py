"""The process in which strangers' chat templates are compiled and rendered, one after the other.

It reads requests and writes answers, each a line of JSON, until its standard input ends. The system ends it if a
request takes more processor time or memory than `main` was told: inside one long call of the interpreter, too, which
no check in a template's own loops would.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from lorax_backend.errors import LoraxError, TemplateError
from lorax_backend.serving.chat import ChatTemplate

_CAPACITY = 64
_SPARE_OUTPUT = 1 << 20


def main(cpu_seconds: float, memory_bytes: int) -> None:
    """Answer requests until there are no more.

    Args:
        cpu_seconds: processor time for one request; SIGPROF ends the process after that.
        memory_bytes: address space of the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the server, which lets requests finish
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = _answers()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        reply = json.dumps(answer(line)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


def _answers() -> Callable[[bytes], dict[str, Any]]:
    compiled: OrderedDict[str, ChatTemplate] = OrderedDict()

    def template(source: str, special_tokens: dict[str, str], owner: str) -> ChatTemplate:
        key = json.dumps([source, special_tokens, owner])
        if key not in compiled:
            compiled[key] = ChatTemplate(source, special_tokens, owner)
        compiled.move_to_end(key)
        while len(compiled) > _CAPACITY:
            compiled.popitem(last=False)
        return compiled[key]

    def answer(line: bytes) -> dict[str, Any]:
        request = json.loads(line)
        owner = request["owner"]
        try:
            found = template(request["source"], request["special_tokens"], owner)
            if "messages" not in request:
                return {"variables": sorted(found.variables)}
            text = found.render(request["messages"], request["tools"], request["guideline"])
        except LoraxError as error:
            return {"error": error.to_dict()}
        except MemoryError:
            return {"memory": True}
        longest = _SPARE_OUTPUT + 8 * len(line)
        if len(text) > longest:
            problem = (
                f"messages: {owner} chat template wrote {len(text)} characters, at most {longest} are allowed"
            )
            return {"error": TemplateError(problem).to_dict()}
        return {"text": text}

    return answer
