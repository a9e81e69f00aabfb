"""tritonserver's log as the command line shows it: progress while loading, afterwards only what matters."""

from __future__ import annotations

import re

# "I1121 10:20:30.123456 77 model.cc:642] text", where newer servers quote the text.
_RECORD = re.compile(r'^(?P<level>[IWEF])\d{4} [\d:.]+ \d+ (?P<place>\S+)\] "?(?P<text>.*?)"?$')
# What a server says at every start without a GPU, and at every stop.
_NOISE = re.compile(
    r"pinned system memory|CudaDriverHelper|CUDA memory pool disabled|NVML|CUDA driver version|"
    r"unable to create stream|Unable to get power|Cannot set priority|gpu metrics|DCGM|^Signal \(\d+\) received",
    re.IGNORECASE,
)
_PROGRESS_MARK = "lorax: "


def progress_message(line: str) -> str | None:
    """The progress the model reports in this line while it loads, or None."""
    record = _RECORD.match(line)
    text = record["text"] if record else line
    return text.removeprefix(_PROGRESS_MARK) if text.startswith(_PROGRESS_MARK) else None


def worth_showing(line: str) -> bool:
    """True for warnings, errors and anything the models print; False for the server's chatter."""
    record = _RECORD.match(line)
    if _NOISE.search(line) or not line.strip():
        return False
    return record is None or record["level"] != "I"
