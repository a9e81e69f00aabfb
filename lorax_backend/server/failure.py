"""Reading the reason of a failed start out of tritonserver's log."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Both of the server's log formats: the default one (a letter, month and day, time) and --log-format=ISO8601.
_RECORD = re.compile(r"^(?:[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ \d+ |\d{4}-\d\d-\d\dT\S+ \d+ [IWEF] )")
_ERROR = re.compile(r"^(?:[EF]\d{4} |\d{4}-\d\d-\d\dT\S+ \d+ [EF] )")
_LOAD_FAILURE = re.compile(
    r"failed to load '(?P<model>[^']+)' version \d+: (?:\w+(?: \w+)?: )?(?P<reason>.*)$"
)
_EXCEPTION_CLASS = re.compile(r"^(?:\w+\.)*\w*(?:Exception|Error): ")
_SOURCE_PREFIX = re.compile(r"^.*?\] \"?")
_TAIL_LINES = 12


def failure_reason(lines: Sequence[str]) -> str:
    """Why the server did not come up: each model's own load error if there is one, else the last error
    lines."""
    reasons = _load_failures(lines)
    if reasons:
        return "\n".join(
            f"{model}: {reason}" if len(reasons) > 1 else reason for model, reason in reasons.items()
        )
    errors = [
        line
        for line in lines
        if _ERROR.match(line) or line.startswith(("error:", "ImportError", "Traceback"))
    ]
    kept = [_SOURCE_PREFIX.sub("", line, count=1) if _RECORD.match(line) else line for line in errors]
    return "\n".join(kept[-_TAIL_LINES:] or lines[-_TAIL_LINES:] or ["the server said nothing"])


def _load_failures(lines: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for index, line in enumerate(lines):
        match = _LOAD_FAILURE.search(line)
        if match is None:
            continue
        text = [match["reason"]]
        for follower in lines[index + 1 :]:
            # The stub appends the place of the exception after "At:"; that is for developers, and is in the
            # log.
            if _RECORD.match(follower) or follower.strip() == "At:":
                break
            text.append(follower)
        reason = "\n".join(text).strip().strip('"').strip()
        found[match["model"]] = _EXCEPTION_CLASS.sub("", reason)
    return found
