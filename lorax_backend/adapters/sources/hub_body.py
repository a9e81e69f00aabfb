"""The bytes of a hub's file as they come, so that a time limit holds however slowly that is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

from lorax_backend.adapters.sources.retry import OutOfTimeError


def append(url: str, headers: Mapping[str, str], part: Path, started: float, limit_s: float) -> None:
    """Append to `part` what it lacks of the file at `url`; what has come stays there in any case.

    Raises:
        OutOfTimeError: it did not end within `limit_s` seconds of `started` (by `time.monotonic()`).
        OSError: it could not be stored, or the hub refused it.
        huggingface_hub.errors.HTTPError: it broke off.
    """
    have = part.stat().st_size if part.exists() else 0
    # Compressed, it could not be taken up at a given byte.
    asked = {**headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=asked, timeout=timeout) as response:
        hf_raise_for_status(response)
        with part.open("ab" if response.status_code == 206 else "wb") as file:
            # Not `iter_bytes(size)`, which waits for so many: each byte in time, the whole for hours.
            for piece in response.iter_bytes():
                file.write(piece)
                if time.monotonic() - started > limit_s:
                    raise OutOfTimeError(limit_s)
