"""Logit processors on a CUDA device: the same distributions and tokens as on the CPU, for every mix of rows."""

from __future__ import annotations

import itertools

import pytest
import torch

from lorax_backend.model.sampler import sample
from lorax_backend.model.sampling_plan import SamplingPlanner
from lorax_backend.model.watermark import WatermarkSettings, green_mask
from lorax_backend.scheduler.sequence import ScheduledSequence, Sequence
from lorax_backend.types import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB = 32_000


def rows() -> list[ScheduledSequence]:
    """One sequence for each combination of a few settings of every processor."""
    choices = itertools.product(
        (False, True), (0, 40), (1.0, 0.9), (1.0, 0.7), (False, True), ((), ((7, 3.0),))
    )
    items = []
    for slot, (sampled, top_k, top_p, typical_p, marked, bias) in enumerate(choices):
        params = SamplingParams(
            max_new_tokens=9, do_sample=sampled, temperature=0.8, top_k=top_k, top_p=top_p, typical_p=typical_p,
            seed=slot, repetition_penalty=1.3 if slot % 3 else 1.0, frequency_penalty=0.4 if slot % 2 else 0.0,
            watermark=marked, logit_bias=bias, top_logprobs=5,
        )  # fmt: skip
        seq = Sequence(slot, 4, params, None, 0, 0.0, token_ids=[1, 2, 3, slot, 9, 9], slot=slot)
        items.append(ScheduledSequence(seq, 5, 1, sample=True, generated_index=2))
    return items


@pytest.mark.parametrize("device_name", ["cuda"])
def test_every_processor_gives_on_the_device_what_it_gives_on_the_cpu(device_name: str) -> None:
    items = rows()
    logits = torch.randn(len(items), VOCAB, generator=torch.Generator().manual_seed(3)) * 4
    drawn = {}
    for name in ("cpu", device_name):
        device = torch.device(name)
        planner = SamplingPlanner(VOCAB, len(items), device)
        last = torch.zeros(len(items), dtype=torch.int64, device=device)
        inputs = planner.plan(items, last, lambda array, to=device: torch.from_numpy(array).to(to))
        drawn[name] = sample(logits.to(device), inputs)
    cpu, gpu = drawn["cpu"], drawn[device_name]
    assert cpu.top_logprobs is not None
    assert gpu.top_logprobs is not None
    # Rounding may move a draw to the neighbouring token once in a while, but not often.
    same = (cpu.ids == gpu.ids.cpu()).float().mean()
    assert same > 0.95
    torch.testing.assert_close(gpu.top_logprobs.cpu(), cpu.top_logprobs, rtol=1e-4, atol=1e-4)


def test_green_lists_are_the_same_on_every_device() -> None:
    previous = torch.arange(0, VOCAB, 997)
    settings = WatermarkSettings()
    assert torch.equal(
        green_mask(previous.cuda(), VOCAB, settings).cpu(), green_mask(previous, VOCAB, settings)
    )


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_processor_waits_for_the_device() -> None:
    items = rows()
    device = torch.device("cuda")
    planner = SamplingPlanner(VOCAB, len(items), device)
    last = torch.zeros(len(items), dtype=torch.int64, device=device)
    logits = torch.randn(len(items), VOCAB, device=device)

    def upload(array):  # type: ignore[no-untyped-def]
        return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)

    sample(
        logits.clone(), planner.plan(items, last, upload)
    )  # the first time allocates the table of occurrences
    torch.cuda.set_sync_debug_mode("error")
    try:
        planner.count_drawn(
            planner.plan(items, last, upload), sample(logits, planner.plan(items, last, upload)).ids
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
