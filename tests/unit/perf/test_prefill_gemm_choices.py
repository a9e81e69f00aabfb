"""Kernels are tried in processes of their own: what becomes of one costs no other."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("triton")
import prefill_gemm_choices as program

BEGIN = "import json, os, sys; todo = json.load(sys.stdin); print('noise'); print('ready', flush=True)"
ANSWER = """
for choice in todo:
    if choice["width"] == 4:
        os._exit(1)
    print("verdict", "ok" if choice["width"] % 2 else "wrong", flush=True)
"""


def tried(monkeypatch: pytest.MonkeyPatch, code: str) -> tuple[list[int], list[str]]:
    monkeypatch.setattr(program, "WORKER", (sys.executable, "-c", code))
    choices = [program.Choice(width, False, program.PrefillConfig()) for width in range(1, 8)]
    good, bad = program.proven(choices, 2)
    return [choice.width for choice in good], [f"{key.split()[0]} {why}" for key, why in bad.items()]


def test_a_kernel_that_ends_its_process_is_left_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = tried(monkeypatch, BEGIN + ANSWER)
    assert good == [1, 3, 5, 7]
    assert bad == ["2 wrong", "4 the process ended", "6 wrong"]


def test_a_process_that_never_begins_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = tried(monkeypatch, "raise SystemExit(1)")
    assert good == []
    assert bad == [f"{width} the process ended" for width in range(1, 8)]


def test_every_choice_is_tried_once_and_named_for_what_it_is() -> None:
    choices = program.site_choices({"qkv": 64, "o": 64, "down": 96, "gate_up+silu": 64})
    names = [(c.width, c.silu, program.shown(c.config, c.silu)) for c in choices]
    assert len(set(names)) == len(names)
    assert {(width, silu) for width, silu, _ in names} == {(64, False), (96, False), (64, True)}
    assert all(choice.config.kernel == "triton" for choice in choices)
