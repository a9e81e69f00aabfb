"""Adapters of one structure are looked at once; what differs between them is never taken for the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import Base, lora_config, lora_tensors, write_adapter

from lorax_backend.adapters.adapter_plan import Structure
from lorax_backend.adapters.checkpoint import AdapterInspector
from lorax_backend.errors import AdapterIncompatibleError

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


class Looks(AdapterInspector):
    """Knows how often it had to look."""

    count = 0
    meanwhile: Callable[[], Any] | None = None

    def _look_at(self, *arguments: Any) -> Structure:
        self.count += 1
        found = super()._look_at(*arguments)
        if self.meanwhile is not None:
            self.meanwhile()
        return found


@pytest.fixture
def looks(tiny: Base) -> Looks:
    return Looks(tiny.targets, tiny.layout, torch.float32, 64)


def make(folder: Path, base: Base, seed: int = 0, rank: int = 4, **config: Any) -> Path:
    tensors = lora_tensors(base.targets, MODULES, rank, seed)
    return write_adapter(folder, lora_config(MODULES, rank, **config), tensors)


def alone(folder: Path, base: Base) -> torch.Tensor:
    return base.load(folder).pages


def used(base: Base, pages: torch.Tensor) -> list[torch.Tensor]:
    """All but the gaps between sites, which are nobody's."""
    return [
        view(pages, name) for name in base.layout.sites for view in (base.layout.a_view, base.layout.b_view)
    ]


def assert_loads_as_alone(looks: Looks, folder: Path, base: Base) -> None:
    for got, want in zip(
        used(base, looks.inspect(folder).load().pages), used(base, alone(folder, base)), strict=True
    ):
        assert torch.equal(got, want)


def test_adapters_trained_alike_are_looked_at_once_and_keep_their_own_weights(
    tmp_path: Path, tiny: Base, looks: Looks
) -> None:
    for seed in range(4):
        assert_loads_as_alone(looks, make(tmp_path / str(seed), tiny, seed), tiny)
    assert looks.count == 1


def test_another_configuration_or_shape_is_another_structure(
    tmp_path: Path, tiny: Base, looks: Looks
) -> None:
    folders = [
        make(tmp_path / "a", tiny),
        make(tmp_path / "b", tiny, lora_alpha=3),
        make(tmp_path / "c", tiny, rank=6),
        make(tmp_path / "d", tiny, use_rslora=True),
    ]
    for folder in folders * 2:
        assert_loads_as_alone(looks, folder, tiny)
    assert looks.count == len(folders)


def test_what_was_replaced_while_it_was_looked_at_is_not_remembered(
    tmp_path: Path, tiny: Base, looks: Looks
) -> None:
    folder, twin = make(tmp_path / "a", tiny), make(tmp_path / "b", tiny)
    looks.meanwhile = lambda: make(folder, tiny, lora_alpha=99)
    looks.inspect(folder)
    looks.meanwhile = None
    assert_loads_as_alone(looks, twin, tiny)
    assert_loads_as_alone(looks, folder, tiny)
    assert looks.count == 3


def test_a_refused_adapter_is_looked_at_again(tmp_path: Path, tiny: Base, looks: Looks) -> None:
    folder = make(tmp_path / "a", tiny, use_dora=True)
    for _ in range(2):
        with pytest.raises(AdapterIncompatibleError, match="DoRA"):
            looks.inspect(folder)
    assert looks.count == 2


def test_the_structures_remembered_are_few(tmp_path: Path, tiny: Base, looks: Looks) -> None:
    for alpha in range(1, 50):
        looks.inspect(make(tmp_path / "a", tiny, lora_alpha=alpha))
    assert len(looks._known) == 32
    looks.inspect(tmp_path / "a")
    assert looks.count == 49
