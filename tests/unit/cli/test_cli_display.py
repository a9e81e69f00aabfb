"""Progress lines, tables and log lines of the command line."""

from __future__ import annotations

import io

import pytest

from lorax_backend.cli.display import (
    PlainDisplay,
    TerminalDisplay,
    byte_size,
    open_display,
    share_done,
    table,
)
from lorax_backend.cli.log import progress_message, worth_showing


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("message", "share"),
    [
        ("converting: 40 %", 0.4),
        ("weights 97.5%", 0.97),
        ("loading shard 3/4", 0.75),
        ("downloading 2 of 8 files", 0.25),
        ("starting tritonserver", None),
        ("model at /data/a/b", None),
        ("9/4", None),
        ("0/0", None),
    ],
)
def test_a_progress_message_tells_its_share(message: str, share: float | None) -> None:
    assert share_done(message) == share


def test_a_plain_display_prints_a_counting_message_once_until_it_is_complete() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream)
    for message in ("looking", "converting: 1 %", "converting: 2 %", "converting: 100 %", "done"):
        display.progress(message)
    assert stream.getvalue().splitlines() == ["looking", "converting: 1 %", "converting: 100 %", "done"]


def test_a_terminal_display_draws_the_message_and_leaves_lines_behind() -> None:
    stream = Terminal()
    display = TerminalDisplay(stream)
    display.progress("converting: 40 %")
    display.line("[a line] that stays")
    display.close()
    display.close()
    assert "converting: 40 %" in stream.getvalue()
    assert "[a line] that stays" in stream.getvalue()


def test_the_display_fits_the_stream() -> None:
    assert isinstance(open_display(Terminal()), TerminalDisplay)
    assert isinstance(open_display(io.StringIO()), PlainDisplay)


def test_a_table_aligns_its_values() -> None:
    lines = table("title", [("a", "1"), ("longer", "2")]).splitlines()
    assert lines == ["title", "", "  a       1", "  longer  2"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (2 << 40, "2.0 TiB")],
)
def test_bytes_are_written_as_people_read_them(count: int, text: str) -> None:
    assert byte_size(count) == text


@pytest.mark.parametrize(
    "line",
    [
        "lorax: loading weights 40 %",
        'I1121 23:57:01.123456 77 model.py:642] "lorax: loading weights 40 %"',
        "I1121 23:57:01.123456 77 model.py:642] lorax: loading weights 40 %",
    ],
)
def test_the_models_progress_is_found_in_the_servers_log(line: str) -> None:
    assert progress_message(line) == "loading weights 40 %"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("I1121 23:57:01.123456 77 server.cc:674] successfully loaded 'lorax'", False),
        (
            "W1121 23:57:01.123456 77 pinned_memory_manager.cc:273] Unable to allocate pinned system memory",
            False,
        ),
        ("E1121 23:57:01.123456 77 model.py:1] the engine died", True),
        ("Traceback (most recent call last):", True),
        ("", False),
    ],
)
def test_only_warnings_errors_and_the_models_own_output_are_shown(line: str, shown: bool) -> None:
    assert worth_showing(line) is shown
    assert progress_message(line) is None


def test_a_bar_goes_back_to_a_spinner_when_the_share_is_not_known() -> None:
    stream = Terminal()
    display = TerminalDisplay(stream)
    display.progress("loading weights: 100 %")
    display.progress("reserving the KV cache")
    display.close()
    after = stream.getvalue().rpartition("reserving the KV cache")[2]
    full_bar = "━" * 30
    assert full_bar not in after
