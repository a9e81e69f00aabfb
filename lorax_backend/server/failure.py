"""Reading the reason of a failed start out of tritonserver's log."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

# A model writes a line that starts so to its stderr when its engine has died; whoever started the server acts on it.
ENGINE_DEAD_MARK = "lorax engine died: "

# A record starts with a letter, month and day, time and thread, or (--log-format=ISO8601) a time, thread and
# letter.
_RECORD = re.compile(
    r"^(?:(?P<level>[IWEF])\d{4} \S+ \d+|\d{4}-\d\d-\d\dT\S+ \d+ (?P<iso_level>[IWEF])) [^\]]*\] (?P<message>.*)$"
)
_LOAD_FAILURE = re.compile(
    r"failed to load '(?P<model>[^']+)' version \d+: (?:\w+(?: \w+)?: )?(?P<reason>.*)", re.DOTALL
)
_EXCEPTION_CLASS = re.compile(r"^(?:\w+\.)*\w*(?:Exception|Error): ")
_TAIL_LINES = 12


def failure_reason(lines: Sequence[str]) -> str:
    """Why the server did not come up: each model's own load error if there is one, else its last errors."""
    reasons = load_failures(lines)
    if len(reasons) == 1:
        return next(iter(reasons.values()))
    if reasons:
        return "\n".join(f"{model}: {reason}" for model, reason in reasons.items())
    errors = [message for level, message in map(_record, lines) if level in ("E", "F")]
    return "\n".join(errors[-_TAIL_LINES:] or lines[-_TAIL_LINES:] or ["the server said nothing"])


def load_failures(lines: Sequence[str]) -> dict[str, str]:
    """Model name -> why it could not be loaded, from the exception its `initialize` raised."""
    found: dict[str, str] = {}
    for index, line in enumerate(lines):
        match = _LOAD_FAILURE.search(_whole_message(lines, index)) if "failed to load '" in line else None
        if match is not None:
            # The stub appends where the exception came from after "At:"; that is for the log.
            reason = match["reason"].partition("\nAt:\n")[0].strip()
            found[match["model"]] = _EXCEPTION_CLASS.sub("", reason)
    return found


def _whole_message(lines: Sequence[str], index: int) -> str:
    """A record's message: a quoted string with escapes on one line, or, in older servers, plain lines."""
    message = _record(lines[index])[1]
    match = _RECORD.match(lines[index])
    if match is not None and match["message"].startswith('"'):
        return message
    text = [message]
    for line in lines[index + 1 :]:
        if _RECORD.match(line):
            break
        text.append(line)
    return "\n".join(text)


def _record(line: str) -> tuple[str, str]:
    """(level, message) of a log line; a line that is the server's last word, `error: ...`, counts as an
    error."""
    match = _RECORD.match(line)
    if match is None:
        is_error = (
            line.startswith(("error:", "ImportError:")) or "error while loading shared libraries" in line
        )
        return ("E" if is_error else "", line)
    message = match["message"]
    try:
        message = json.loads(message) if message.startswith('"') else message
    except ValueError:
        message = message.strip('"')
    return match["level"] or match["iso_level"], message
