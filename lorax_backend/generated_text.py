"""Parts of documents that programs write, between two markers. Standard library only."""

from __future__ import annotations


def with_part(text: str, begin: str, end: str, part: str) -> str:
    """`text` with what stands between the lines `begin` and `end` replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"the document needs the line {begin} and after it {end}")
    return f"{before}{begin}\n{part}\n{end}{after}"
