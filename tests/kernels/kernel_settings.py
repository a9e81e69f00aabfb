"""Configurations of kernels that the environment sets for one test."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from lorax_kernels import tuning


@contextmanager
def configured(monkeypatch: pytest.MonkeyPatch, **kinds: Mapping[str, object]) -> Iterator[None]:
    """Let fields of configurations, by kind, go before every table: `gemm={"kernel": "triton"}`. In the end all that
    `monkeypatch` has changed is undone."""
    for kind, fields in kinds.items():
        monkeypatch.setenv(tuning.OVERRIDE.format(kind=kind.upper()), json.dumps(fields))
    tuning.forget_configs()
    yield
    monkeypatch.undo()
    tuning.forget_configs()
