"""The check of greedy tokens finds what differs, and tells it from a near tie."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import gpu_equality
import pytest
import torch_twins
from gpu_equality import first_difference, near_tie

from lorax_kernels import attention_reference, dispatch

ARGUMENTS = ["--shape", "tiny", "--dtypes", "float32", "--streams", "3", "--tokens", "4"]


@pytest.mark.parametrize(
    ("best", "second", "deviation", "dtype", "tie"),
    [
        (5.0, 4.9995, 1.0, "float32", True),
        (5.0, 4.99, 1.0, "float32", False),
        (5.0, 4.9, 1.0, "bfloat16", True),  # a step of bfloat16 between 4 and 8 is 1/32
        (5.0, 4.8, 1.0, "bfloat16", False),
    ],
)
def test_a_near_tie_is_within_the_rounding_of_the_dtype(
    best: float, second: float, deviation: float, dtype: str, tie: bool
) -> None:
    assert near_tie(best, second, deviation, dtype)[0] is tie


def test_the_first_difference_counts_also_if_one_answer_is_shorter() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_ways_to_compute_that_agree_pass(tmp_path: Path) -> None:
    assert gpu_equality.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "equality-tiny.json").read_text())
    assert [entry["check"] for entry in report["checks"]] == [
        "as served against without graphs",
        "as served against without overlap",
        "as served against in plain torch",
        "all at once against one by one",
    ]
    assert all(entry["equal"] + len(entry["near_ties"]) == 3 for entry in report["checks"])
    assert report["checks"][0]["different_answers"] > 1


def test_a_kernel_that_is_off_by_half_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = (attention_reference, "paged_attention")
    plain = torch_twins.TWINS[place]
    monkeypatch.setitem(torch_twins.TWINS, place, lambda *args: 1.5 * plain(*args))
    assert gpu_equality.main([*ARGUMENTS, "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "equality-tiny.json").read_text())
    wrong = {entry["check"]: len(entry["wrong"]) for entry in report["checks"]}
    assert wrong.pop("as served against in plain torch") > 0
    assert set(wrong.values()) == {0}


def test_a_place_that_is_no_more_is_an_error_rather_than_no_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(torch_twins.TWINS, (dispatch, "no_such_kernel"), torch_twins.never)
    with pytest.raises(AttributeError, match="no_such_kernel"), torch_twins.plain_torch():
        pass


def test_nothing_goes_to_triton_meanwhile_and_everything_as_before_afterwards() -> None:
    on_a_gpu = SimpleNamespace(is_cuda=True)
    assert dispatch._uses_triton(on_a_gpu)  # type: ignore[arg-type]
    with torch_twins.plain_torch():
        assert not dispatch._uses_triton(on_a_gpu)  # type: ignore[arg-type]
        assert attention_reference.paged_attention is torch_twins.paged_attention
    assert dispatch._uses_triton(on_a_gpu)  # type: ignore[arg-type]
    assert attention_reference.paged_attention is not torch_twins.paged_attention
