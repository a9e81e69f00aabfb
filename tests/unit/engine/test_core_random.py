"""Random operations on the whole core: whatever happens, every request gets the answer it would get alone."""

from __future__ import annotations

from typing import Any

from fakes_engine import (
    STOP_TOKEN,
    FakeAdapter,
    FakeClock,
    FakeProvider,
    expected_answer,
    make_core,
    make_request,
    make_settings,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorax_backend.types import EngineRequest, FinishReason, TokenOutput

_SHARED = [1, 2, 1, 1, 2, 2, 1, 2, 1, 1, 1, 2, 2, 2, 1, 2, 1, 2, 2, 1]
_ADAPTERS = ["now", "soon", "late", "wide", "huge", "broken", "unknown"]
_ENDLESS = 600


class CoreMachine(RuleBasedStateMachine):
    """Late, failing and oversized adapters, cancellations, failing steps, too few blocks, rows, slots and tokens."""

    @initialize(
        num_blocks=st.integers(3, 20),
        block_size=st.integers(1, 4),
        rows=st.integers(1, 6),
        budget=st.integers(1, 16),
        chunked=st.booleans(),
        caching=st.booleans(),
        depth=st.integers(1, 2),
        slots=st.integers(1, 3),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        rows: int,
        budget: int,
        chunked: bool,
        caching: bool,
        depth: int,
        slots: int,
    ) -> None:
        self.clock = FakeClock()
        adapters = {
            "now": FakeAdapter(),
            "soon": FakeAdapter(polls=4),
            "late": FakeAdapter(polls=None),
            "wide": FakeAdapter(pages=3),
            "huge": FakeAdapter(pages=5),
            "broken": FakeAdapter(polls=2, fails=True),
        }
        limits = make_settings(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=rows,
            max_batch_tokens=budget,
            max_input_length=24,
            max_total_tokens=40,
            chunked_prefill=chunked,
            prefix_caching=caching,
        )
        provider = FakeProvider(adapters, num_slots=slots, num_pages=3)
        self.core, self.runner, self.provider = make_core(limits, provider, depth, self.clock)
        self.live: dict[int, EngineRequest] = {}
        self.answers: dict[int, list[int]] = {}
        self.next_fault = 0
        self.num_requests = 0

    @rule(
        shared=st.integers(0, 20),
        own=st.lists(st.integers(1, 2), min_size=0, max_size=5),
        adapter=st.none() | st.sampled_from(_ADAPTERS),
        max_new_tokens=st.integers(1, 12),
        min_new_tokens=st.integers(0, 3),
        stops=st.booleans(),
        priority=st.integers(-1, 1),
    )
    def add(
        self, shared: int, own: list[int], adapter: str | None, priority: int, stops: bool, **limits: Any
    ) -> None:
        prompt = _SHARED[:shared] + own or [1]
        handle = self.num_requests = self.num_requests + 1
        stop_token_ids = (STOP_TOKEN,) if stops else ()
        request = make_request(
            handle, prompt, adapter, seed=handle, priority=priority, stop_token_ids=stop_token_ids, **limits
        )
        self.live[handle] = request
        self.answers[handle] = []
        self.take(self.core.add(request))

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 99))
    def cancel(self, choice: int) -> None:
        handle = sorted(self.live)[choice % len(self.live)]
        self.core.cancel(handle)
        del self.live[handle]

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.clock.now += 0.3
            self.take(self.core.step())

    @rule()
    def the_late_adapter_arrives(self) -> None:
        self.provider.finish_loading("late")

    @precondition(lambda self: self.runner.launches >= self.next_fault)
    @rule(in_launch=st.booleans())
    def the_next_step_fails(self, in_launch: bool) -> None:
        faults = self.runner.fail_launch if in_launch else self.runner.fail_result
        faults.add(self.runner.launches)
        self.next_fault = self.runner.launches + 6  # the engine rightly gives up if too many fail in a row

    def take(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            assert output.handle in self.live, "an output of a request that is over"
            request = self.live[output.handle]
            answer = self.answers[output.handle]
            if output.token_id is not None:
                assert (output.cached_tokens is not None) == (output.queue_s is not None) == (not answer)
                answer.append(output.token_id)
            key = FakeProvider.key(request.adapter.id) if request.adapter else ""
            expected, reason = expected_answer(request, key)
            assert answer == expected[: len(answer)]
            if output.finish_reason is not None:
                assert (answer, output.finish_reason) == (expected, reason)
                del self.live[output.handle]
            elif output.error is not None:
                self.expect_error(request, output.error)
                del self.live[output.handle]
            else:
                assert len(answer) < len(expected), "the answer did not end where it should"

    def expect_error(self, request: EngineRequest, error: dict[str, Any]) -> None:
        kind, name = error["error_type"], request.adapter.id if request.adapter else None
        if kind == "validation":
            needed = len(request.prompt_ids) + request.sampling.max_new_tokens - 1
            limits = self.runner.settings
            assert needed > limits.num_blocks * limits.block_size or len(request.prompt_ids) > 24
        elif kind == "generation":
            assert "fails" in error["error"], error
            assert self.runner.fail_launch or self.runner.fail_result
        else:
            assert (kind, name) in {
                ("adapter_not_found", "broken"),
                ("adapter_not_found", "unknown"),
                ("adapter_too_large", "huge"),
            }

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.core.check_integrity()
        assert self.runner.violations == []
        assert self.core.scheduler.num_running + self.core.scheduler.num_waiting == len(self.live)
        assert self.provider.num_wanted >= sum(1 for request in self.live.values() if request.adapter)

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        self.provider.finish_loading("late")
        for _ in range(_ENDLESS):
            self.clock.now += 0.3
            self.take(self.core.step())
            if not self.core.has_work and not self.core.scheduler.num_waiting:
                break
        assert not self.live, f"starved: {self.live}"
        self.core.step()
        assert self.runner.violations == []
        stats = self.core.stats()
        assert (stats.waiting, stats.running, stats.blocks_used) == (0, 0, 0)
        assert self.provider.num_wanted == 0
        assert not any(self.provider.users.values()), "an adapter was activated and never given back"


CoreMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestRandomOperationsOnTheCore = CoreMachine.TestCase


def test_the_fake_model_ends_by_stop_tokens_and_by_length() -> None:
    """The random test above means little unless both ends occur."""
    requests = [
        make_request(n, [1, n], max_new_tokens=12, stop_token_ids=(STOP_TOKEN,), seed=n) for n in range(40)
    ]
    ends = {expected_answer(request)[1] for request in requests}
    assert ends == {FinishReason.EOS, FinishReason.LENGTH}
