"""Stop strings in pieces of text against a search in the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_backend.serving.stop import StopChecker

LETTERS = st.text(alphabet="ab\n", max_size=30)


def run(checker: StopChecker, pieces: list[str]) -> str:
    return "".join(checker.feed(piece) for piece in pieces) + checker.flush()


def expected(text: str, stops: list[str], include: bool) -> str:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not ends:
        return text
    end, start = min(ends)
    return text[: end if include else start]


def test_a_stop_string_inside_a_token_is_found_and_what_follows_is_cut() -> None:
    checker = StopChecker(["END"])
    assert checker.feed("fooEND.") == "fooEND"
    assert checker.matched == "END"
    assert checker.feed("more") == ""


def test_a_newline_after_the_stop_string_is_not_needed_and_not_kept() -> None:
    assert run(StopChecker(["END"]), ["END\n"]) == "END"


def test_text_is_shown_at_once_when_the_stop_string_is_kept() -> None:
    checker = StopChecker(["END"])
    assert checker.feed("E") == "E"
    assert checker.feed("ND!") == "ND"


def test_a_possible_beginning_is_held_back_when_the_stop_string_is_dropped() -> None:
    checker = StopChecker(["END"], include=False)
    assert [checker.feed(piece) for piece in ("a", "E", "N", "x", "EN")] == ["a", "", "", "ENx", ""]
    assert checker.flush() == "EN"


def test_of_two_stop_strings_the_one_complete_first_counts() -> None:
    checker = StopChecker(["abcd", "bc"])
    assert checker.feed("xabcd") == "xabc"
    assert checker.matched == "bc"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    pieces=st.lists(LETTERS, max_size=8),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_pieces_give_what_the_whole_text_gives(pieces: list[str], stops: list[str], include: bool) -> None:
    checker = StopChecker(stops, include)
    shown = ""
    target = expected("".join(pieces), stops, include)
    for piece in pieces:
        shown += checker.feed(piece)
        assert target.startswith(shown)
    assert shown + checker.flush() == target
    assert (checker.matched is not None) == any(stop in "".join(pieces) for stop in stops)
