"""What a graph reads comes in one copy of what the step has, and a step of one sequence is as any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from model_driver import ModelDriver

from lorax_backend.model.graph_inputs import GraphInputs, Section
from lorax_backend.model.step_arrays import StepArrays
from lorax_backend.types import SamplingParams
from lorax_kernels import LoraBatch

SECTIONS = {
    size: {
        "ids": Section((size,)),
        "tiles": Section((3, 2), (size, 0)),
        "slots": Section((size + 1,), -1, wide=True),
        "tables": Section((size, 7)),
    }
    for size in (2, 5)
}


@pytest.fixture
def inputs() -> GraphInputs:
    return GraphInputs(SECTIONS, max_pages=2, device=torch.device("cpu"))


def test_sections_have_their_shape_begin_on_16_bytes_and_never_overlap(inputs: GraphInputs) -> None:
    for size, sections in SECTIONS.items():
        host = inputs.next_host(size)
        for number, name in enumerate(("work", *sections), start=1):
            part = inputs.part(name, size)
            assert part.data_ptr() % 16 == 0
            assert part.shape == host.parts[name].shape
            assert part.dtype == (torch.int64 if name == "slots" else torch.int32)
            host.parts[name][...] = number
        inputs.send(host, size, with_work=True)
        for number, name in enumerate(("work", *sections), start=1):
            assert inputs.part(name, size).eq(number).all(), name


def test_what_a_step_does_not_fill_is_blank_whatever_was_there(inputs: GraphInputs) -> None:
    for _ in range(9):  # more than there are copies
        host = inputs.next_host(5)
        assert host.parts["ids"].tolist() == [0] * 5
        assert host.parts["tiles"].tolist() == [[5, 0]] * 3
        assert host.parts["slots"].tolist() == [-1] * 6
        for part in host.parts.values():
            part[...] = 77
        for part in inputs.next_host(2).parts.values():
            part[...] = 78


def test_a_copy_takes_no_work_list_and_no_tables_that_a_step_does_not_have(inputs: GraphInputs) -> None:
    for with_work in (False, True):
        inputs.part("work", 5).fill_(-3)
        inputs.part("tables", 5).fill_(-3)
        host = inputs.next_host(5)
        host.tables[:] = 4
        LoraBatch.build(np.array([-1, 0, 0], np.int32), np.array([[6, 8]], np.int32), np.array([9], np.int32),
                        "cpu", inputs.work[5])  # fmt: skip
        inputs.send(host, 2, with_work)
        assert inputs.part("tables", 5).tolist() == [[4] * 7] * 2 + [[-3] * 7] * 3
        assert inputs.part("work", 5)[:3].tolist() == ([1, 2, 2] if with_work else [-3] * 3)


def assert_equal(got: StepArrays, want: StepArrays) -> None:
    for name in (field.name for field in fields(StepArrays)):
        one, other = getattr(got, name), getattr(want, name)
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype, name
            np.testing.assert_array_equal(one, other, err_msg=name)
        else:
            assert one == other, name
    assert list(got.prefills()) == list(want.prefills())
    assert got.token_adapters.dtype == want.token_adapters.dtype


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 50])
def test_a_step_of_one_sequence_has_the_numbers_that_steps_of_many_have(
    length: int, scored: bool, tiny_model_path: Callable[..., Path]
) -> None:
    driver = ModelDriver(tiny_model_path("llama"))
    builder = driver.runner._builder
    for cut in {1, length // 3, length - 1, length} - {0}:
        seq = driver.add(range(5, 5 + length), 3, SamplingParams(max_new_tokens=9, prompt_logprobs=scored))
        batches = [driver.batch([(seq, cut)])]
        if cut < length:
            batches.append(driver.batch([(seq, length - cut)]))
        batches.append(driver.batch([(seq, 1)], in_flight=True))  # its id is only on the device
        for batch in batches:
            assert_equal(builder.arrays(batch), builder._arrays_of_many(batch.sequences))
        driver.remove(seq)


@pytest.mark.parametrize("bad", [-1, 384, 2**31 - 1])
def test_an_id_that_is_no_token_is_found_in_a_step_of_one_sequence(
    bad: int, tiny_model_path: Callable[..., Path]
) -> None:
    driver = ModelDriver(tiny_model_path("llama"))
    seq = driver.add([5, bad, 6])
    with pytest.raises(ValueError, match=f"{bad}.* vocabulary of {driver.runner.model_config.vocab_size}"):
        driver.runner.launch(driver.batch([(seq, 3)]))
