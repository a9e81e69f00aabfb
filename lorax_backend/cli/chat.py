"""`lorax-triton chat`: talk to a running server in a terminal, or through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from lorax_backend.cli.adapters import adapters_table
from lorax_backend.cli.connection import add_adapter_flags, add_connection_flags, add_token_flag, connect
from lorax_backend.cli.ctrl_c import CtrlC

if TYPE_CHECKING:
    from lorax_triton import Client, StreamDetails

_HELP = """\
/adapter NAME   talk to another adapter; /adapter - is the base model, /adapter alone says which it is
/adapters       list the adapters the server knows
/system TEXT    set the system prompt; without TEXT, remove it
/reset          forget the conversation
/quit           leave (so does Ctrl-D); Ctrl-C stops an answer
A line that ends with \\ goes on in the next one."""
_CHECK_PROMPT = "Hello"


def add_chat_words(words: argparse._SubParsersAction[Any]) -> None:
    """Add `chat` with its flags to the command line."""
    chat = words.add_parser(
        "chat",
        help="talk to a running server in the terminal",
        description="Talk to a running server. Lines come from the terminal or from a pipe.",
        allow_abbrev=False,
    )
    chat.add_argument("--adapter", help="adapter to talk to: hub id, id@revision, folder [the base model]")
    add_adapter_flags(chat)
    add_token_flag(chat)
    chat.add_argument("--system", help="system prompt")
    chat.add_argument("--max-new-tokens", type=int, default=512, help="longest answer in tokens [512]")
    chat.add_argument("--temperature", type=float, help="above 0 draws at random [greedy]")
    chat.add_argument("--top-p", type=float, help="draw among the likeliest tokens of this probability")
    chat.add_argument("--seed", type=int, help="seed of the random draws")
    add_connection_flags(chat)


def run_chat(parsed: argparse.Namespace) -> int:
    """Hold a conversation until the input ends; the exit status."""
    from lorax_triton import LoraxError

    try:
        with connect(parsed) as client:
            options = {
                "adapter_source": parsed.adapter_source,
                "api_token": parsed.api_token,
                "max_new_tokens": parsed.max_new_tokens,
                "temperature": parsed.temperature,
                "top_p": parsed.top_p,
                "seed": parsed.seed,
            }
            chat = Chat(client, options, parsed.adapter or None, parsed.revision, parsed.system)
            return chat.run()
    except (LoraxError, ValueError) as error:
        print(f"lorax-triton: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


@dataclass
class Chat:
    """A conversation with one server. Answers go to standard output, everything else to standard error.

    Attributes:
        client: the server.
        options: arguments of `generate_stream`, for every answer.
        adapter: None is the base model.
        revision: of the adapter, for ids that name none.
        system: system prompt, or None.
    """

    client: Client
    options: Mapping[str, Any]
    adapter: str | None = None
    revision: str | None = None
    system: str | None = None
    out: TextIO = field(default_factory=lambda: sys.stdout)
    notes: TextIO = field(default_factory=lambda: sys.stderr)
    history: list[dict[str, str]] = field(default_factory=list)
    templated: bool = True
    failed: bool = False
    interactive: bool = False

    def run(self) -> int:
        """Read lines and answer them until the input ends; 1 if an answer failed that a program asked for.

        Raises:
            LoraxError: the server cannot be reached at all.
            ValueError: the adapter to begin with cannot be used.
        """
        info = self.client.info()
        self.templated = bool(info.get("has_chat_template", True))
        self.interactive = sys.stdin.isatty()
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() a history and editing
            self._note(
                f"{info.get('model_id', 'a model')} at {self.client.base_url}; /help lists the commands"
            )
        if not self.templated:
            self._note(
                "the model has no chat template: every line is sent as it is, without what came before"
            )
        self._check_adapter(f"--adapter {self.adapter}")
        going = True
        while going:
            try:
                going = self._turn()
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self._note("\n/quit or Ctrl-D leaves")
        return int(self.failed and not self.interactive)

    def _check_adapter(self, asked: str) -> None:
        """Ask the adapter for one token, so that a wrong one is told before anybody has written to it. It is loaded
        then, too. Needs no more rights than the chat itself, as commands for administrators would.

        Raises:
            ValueError: the adapter cannot be used; `asked`, the user's words for it, come first.
            KeyboardInterrupt: Ctrl-C was pressed meanwhile.
        """
        from lorax_triton import AdapterError, LoraxError, OverloadedError, ValidationError

        if self.adapter is None:
            return
        request: dict[str, Any] = {name: self.options.get(name) for name in ("adapter_source", "api_token")}
        request |= {"prompt": _CHECK_PROMPT, "max_new_tokens": 1, "details": False, **self._adapter()}
        with CtrlC() as ctrl_c:
            try:
                with self.client.generate_stream(**request) as stream:
                    ctrl_c.calls(stream.cancel)
                    stream.response()
            except OverloadedError:
                pass  # nothing is wrong with the adapter
            except LoraxError as error:
                if not ctrl_c.pressed:
                    if isinstance(error, AdapterError | ValidationError):
                        raise ValueError(f"{asked}: {error}") from None
                    raise
        if ctrl_c.pressed:
            raise KeyboardInterrupt

    def _switch(self, name: str) -> None:
        """Talk to another adapter, "-" for the base model, or stay with this one if that cannot be used.

        Raises:
            ValueError, LoraxError: it cannot, and a program asked, whose next messages this one must not answer.
        """
        from lorax_triton import LoraxError

        former = self.adapter, self.revision
        self.adapter, self.revision = (None if name == "-" else name), None
        still = ""
        try:
            self._check_adapter(f"/adapter {name}")
        except (ValueError, LoraxError, KeyboardInterrupt) as error:
            if not self.interactive:
                raise
            self.adapter, self.revision = former
            still = "still "
            self._note("" if isinstance(error, KeyboardInterrupt) else f"error: {error}")
        self._note(f"{still}talking to {self.adapter or 'the base model'}")

    def _turn(self) -> bool:
        """Read one message and do what it says; False ends the chat."""
        text = self._read()
        if text is None:
            return False
        if text.startswith("/"):
            return self._command(text)
        if text.strip():
            self._answer(text)
        return True

    def _read(self) -> str | None:
        """The next message, or None at the end of the input."""
        lines: list[str] = []
        while True:
            try:
                if self.interactive:
                    line = input(f"{'...' if lines else self.adapter or 'base'}> ")
                else:
                    line = sys.stdin.readline()
                    if not line:
                        raise EOFError
            except EOFError:
                if self.interactive:
                    print(file=self.notes)
                return "\n".join(lines) if lines else None
            line = line.rstrip("\n")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _command(self, text: str) -> bool:
        """Do what a line with a slash says; False ends the chat."""
        word, _, rest = text.strip().partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return False
        if word == "/adapter":
            if rest:
                self._switch(rest)
            else:
                self._note(f"talking to {self.adapter or 'the base model'}")
        elif word == "/adapters":
            self._list_adapters()
        elif word == "/system":
            self.system = rest or None
            self._note("system prompt set" if rest else "no system prompt")
        elif word == "/reset":
            self.history.clear()
            self._note("conversation forgotten")
        elif word == "/help":
            self._note(_HELP)
        else:
            self._note(f"{word} is no command; /help lists them")
        return True

    def _list_adapters(self) -> None:
        from lorax_triton import LoraxError

        try:
            self._note(adapters_table(self.client.adapters.list()))
        except LoraxError as error:
            self._note(f"error: {error}")

    def _answer(self, text: str) -> None:
        """Send a message, print the answer as it comes, and remember both."""
        from lorax_triton import LoraxError

        shown: list[str] = []
        start = time.monotonic()
        with CtrlC() as ctrl_c:
            try:
                ending = self._stream(text, shown, start, ctrl_c)
            except LoraxError as error:
                ending = f"error: {error}"
                if not ctrl_c.pressed:
                    self.failed = True
                    if not shown:
                        self._note(ending)
                        return
        if ctrl_c.pressed:
            if not self.interactive:
                raise KeyboardInterrupt
            ending = f"stopped after {time.monotonic() - start:.1f} s"
        print(file=self.out, flush=True)
        self._note(f"[{self.adapter or 'base'}: {ending}]")
        if shown:
            self.history += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "".join(shown)},
            ]

    def _stream(self, text: str, shown: list[str], start: float, ctrl_c: CtrlC) -> str:
        """Print the answer's pieces, noting them in `shown`; how it ended, in words."""
        first: float | None = None
        details: StreamDetails | None = None
        with self.client.generate_stream(**self._prompt(text), **self._adapter(), **self.options) as stream:
            ctrl_c.calls(stream.cancel)
            for item in stream:
                first = time.monotonic() - start if first is None else first
                details = item.details or details
                if item.token.text and not item.token.special:
                    shown.append(item.token.text)
                    print(item.token.text, end="", file=self.out, flush=True)
        return timings_text(details, first or 0.0, time.monotonic() - start)

    def _prompt(self, text: str) -> dict[str, Any]:
        if not self.templated:
            return {"prompt": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": [*system, *self.history, {"role": "user", "content": text}]}

    def _adapter(self) -> dict[str, Any]:
        if self.adapter is None:
            return {}
        return {"adapter_id": self.adapter, "adapter_revision": self.revision}

    def _note(self, text: str) -> None:
        print(text, file=self.notes, flush=True)


def timings_text(details: StreamDetails | None, first_s: float, total_s: float) -> str:
    """How long an answer was and took: tokens, time to the first, pace after it, why it ended."""
    if details is None:
        return f"{total_s:.1f} s"
    count = details.generated_tokens
    pace = f", {(count - 1) / (total_s - first_s):.1f} tokens/s" if count > 1 and total_s > first_s else ""
    return (
        f"{details.prompt_tokens} + {count} tokens, first after {first_s:.2f} s{pace}, "
        f"{total_s:.2f} s in all, ended by {details.finish_reason.value}"
    )
