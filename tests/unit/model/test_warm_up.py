"""What runs at start so that kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from model_driver import ModelDriver

from lorax_backend.model.warm_up import warm_up_prefill
from lorax_kernels import AttentionBatch


@pytest.mark.parametrize("longest", [16, 128, 512])
def test_no_prompt_is_longer_than_one_may_be(
    tiny_model_path: Callable[..., Path], longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of blocks ends with the longest prompt; on a device a kernel would read on behind it."""
    runner = ModelDriver(tiny_model_path("llama"), max_total_tokens=longest).runner
    plain, rows = AttentionBatch.build, []

    def build(
        starts: np.ndarray, contexts: np.ndarray, tables: np.ndarray, *others: object
    ) -> AttentionBatch:
        assert (contexts <= tables.shape[1] * runner._builder.block_size).all()
        rows.append(int(starts[-1]))
        assert contexts.sum() == rows[-1]
        return plain(starts, contexts, tables, *others)

    monkeypatch.setattr(AttentionBatch, "build", build)
    warm_up_prefill(runner.decoder, runner._builder, runner._cache)
    assert max(rows) > 256, "steps with long prompts have kernels of their own"
