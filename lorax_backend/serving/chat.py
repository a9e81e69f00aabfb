"""Chat messages: their checks, and the model's chat template.

Templates are Jinja, written for the environment that transformers gives them: sandboxed, blocks trimmed, with
`raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, loop controls and `{% generation %}` blocks.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from lorax_backend.errors import MissingTemplateVariableError, TemplateError, ValidationError
from lorax_backend.serving.schema import shorten

_GUIDELINE = "guideline"
_TOOL_PROMPT = (
    "To call one of these functions, answer with nothing but a block like this, one block for each call:\n"
    '<tool_call>\n{"name": <name of the function>, "arguments": <object of its arguments>}\n</tool_call>'
)
# Of one text or list that a template multiplies, and of a power's exponent. Adapters bring templates of strangers.
_MAX_PRODUCT_LENGTH = 1 << 20
_MAX_EXPONENT = 64
_LONGEST_REASON = 2000  # characters of what a template says in refusing


def validate_messages(messages: Any, label: str = "messages") -> list[dict[str, Any]]:
    """Check a chat and join the text parts of each content into one text; returns new dicts.

    A content may be a text, a list of `{"type": "text", "text": ...}` parts, or null where `tool_calls` are given.

    Raises:
        ValidationError: naming the message and key at fault.
    """
    if not isinstance(messages, list) or not messages:
        raise ValidationError(f"{label}: must be a list of at least one message")
    result = []
    for index, message in enumerate(messages):
        where = f"{label}[{index}]"
        if not isinstance(message, dict):
            raise ValidationError(
                f"{where}: expected an object with role and content, got {shorten(message)}"
            )
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise ValidationError(
                f"{where}.role: expected a text such as user, assistant or system, got {shorten(role)}"
            )
        result.append({**message, "content": _content(message, where)})
    return result


def _content(message: dict[str, Any], where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, list):
        raise ValidationError(f"{where}.content: expected a text or a list of parts, got {shorten(content)}")
    texts = []
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValidationError(f'{place}: only parts of type "text" are supported, got {shorten(kind)}')
        if not isinstance(part.get("text"), str):
            raise ValidationError(f"{place}.text: expected a text, got {shorten(part.get('text'))}")
        texts.append(part["text"])
    return "".join(texts)


def template_source(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The text of a folder's template: `chat_template.jinja`, else `chat_template` of its tokenizer_config.json.

    A list of named templates yields the one called "default".
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) and source else None


class ChatTemplate:
    """A compiled chat template. Rendering is thread-safe.

    Args:
        source: the Jinja text.
        special_tokens: texts such as `bos_token` and `eos_token` that templates refer to.
        owner: whose template error messages say it is.

    Attributes:
        variables: names the template reads, such as `messages` and, if it knows what to do with them, `tools`.

    Raises:
        TemplateError: the text is not a template.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], owner: str = "the model's") -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._owner = owner
        self._template = _compile(source, owner)
        self.variables = _variables(source)
        self._uses_guideline = _GUIDELINE in self.variables

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer_config: dict[str, Any], special: dict[str, str]
    ) -> ChatTemplate | None:
        """The template of a model folder, if it has one; see `template_source`."""
        source = template_source(folder, tokenizer_config)
        return None if source is None else cls(source, special)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        guideline: str | None = None,
    ) -> str:
        """The prompt for a chat, ending where the assistant's answer begins.

        A template that does not read `tools`, as an adapter may bring one, gets them written out in the last message.

        Raises:
            MissingTemplateVariableError: the template needs a guideline and there is none.
            TemplateError: the template failed, or refused the messages with `raise_exception`.
        """
        import jinja2

        if guideline is None and self._uses_guideline:
            raise MissingTemplateVariableError("guideline: the chat template needs one; send guideline")
        given = {} if guideline is None else {"guideline": guideline}
        if tools and "tools" not in self.variables:
            messages = _with_tools_as_text(messages, tools)
        try:
            return self._template.render(
                **given,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            reason = str(error)[:_LONGEST_REASON]
            raise TemplateError(f"messages: {self._owner} chat template refused them: {reason}") from None
        except MemoryError:
            raise
        except Exception as error:  # templates run arbitrary expressions over the caller's values
            reason = f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
            raise TemplateError(f"messages: {self._owner} chat template failed: {reason}") from None


def _with_tools_as_text(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}\n\n<tools>\n{listed}\n</tools>\n{_TOOL_PROMPT}"}]


def _variables(source: str) -> frozenset[str]:
    """The variables that a template reads and does not set itself."""
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(_environment().parse(source)))


def _compile(source: str, owner: str) -> Any:
    import jinja2

    try:
        return _environment().from_string(source)
    except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
        reason = str(error)[:_LONGEST_REASON]
        raise TemplateError(f"messages: {owner} chat template is not valid: {reason}") from error


def _check_product(operator: str, left: Any, right: Any) -> None:
    import jinja2

    if operator == "**" and isinstance(right, int | float) and abs(right) > _MAX_EXPONENT:
        raise jinja2.TemplateError(f"a power of {right}, at most {_MAX_EXPONENT} is allowed")
    for item, count in ((left, right), (right, left)):
        if isinstance(item, str | list | tuple) and isinstance(count, int):
            length = len(item) * count
            if length > _MAX_PRODUCT_LENGTH:
                raise jinja2.TemplateError(
                    f"a product of length {length}, at most {_MAX_PRODUCT_LENGTH} is allowed"
                )


def _environment() -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; here its content simply stands."""

        tags = {"generation"}  # noqa: RUF012 - the attribute is jinja2's

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Environment(ImmutableSandboxedEnvironment):
        """Refuses products that would fill the memory, which jinja2 else works out while it compiles."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_product(operator, left, right)
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
