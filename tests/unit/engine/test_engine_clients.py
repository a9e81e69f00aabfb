"""The contract of EngineClient, kept alike by the engine on a thread and the engine in a process of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes_engine import FakeEngineBuilder, make_request
from recording_owner import RecordingOwner

from lorax_backend.engine.client import EngineClientBase
from lorax_backend.engine.process import ProcessEngine, python_executable
from lorax_backend.errors import EngineDeadError, ValidationError
from lorax_backend.types import TokenOutput

_TIMEOUT_S = 60.0
_FOREVER = {"max_new_tokens": 3900, "prompt": [1]}


Start = Callable[..., tuple[EngineClientBase, RecordingOwner]]


def ask_until_refused(engine: EngineClientBase, timeout: float) -> None:
    """Control commands between steps are answered; go on until one meets a step that takes long."""
    while True:
        engine.control("stats", {}, timeout)


def test_requests_are_answered_by_one_thread(start: Start) -> None:
    engine, owner = start()
    assert engine.alive
    assert engine.info.model_id == "fake"
    requests = [make_request(n, range(1, n + 2), "otter" if n % 2 else None, seed=n) for n in range(20)]
    for request in requests:
        engine.submit(request)
    owner.wait(lambda: all(owner.is_over(n) for n in range(20)))
    for request in requests:
        owner.assert_answered(request)
    assert len(owner.threads) == 1


def test_an_error_reaches_only_the_request_it_is_about(start: Start) -> None:
    engine, owner = start()
    good = make_request(2)
    engine.submit(make_request(1, adapter="nonesuch"))
    engine.submit(good)
    engine.submit(make_request(3, range(200)))
    owner.wait(lambda: all(owner.is_over(n) for n in (1, 2, 3)))
    errors = [owner.of(n)[-1].error for n in (1, 3)]
    assert [error["error_type"] for error in errors if error] == ["adapter_not_found", "validation"]
    owner.assert_answered(good)


def test_a_request_gives_up_in_time_though_nothing_else_wakes_the_engine(start: Start) -> None:
    engine, owner = start()
    engine.submit(make_request(1, adapter="late", queue_timeout_s=0.1))
    owner.wait(lambda: owner.is_over(1))
    [output] = owner.of(1)
    assert output.error is not None
    assert output.error["error_type"] == "overloaded"


def test_a_cancelled_request_stops_and_frees_its_blocks(start: Start) -> None:
    engine, owner = start(step_seconds=0.001)
    engine.submit(make_request(1, **_FOREVER))
    owner.wait(lambda: owner.of(1))
    engine.cancel(1)
    engine.cancel(99)
    assert engine.control("stats", {})["blocks_used"] == 0
    produced = len(owner.of(1))
    follower = make_request(2)
    engine.submit(follower)
    owner.wait(lambda: owner.is_over(2))
    assert len(owner.of(1)) == produced


def test_stats_come_when_the_engine_becomes_idle_and_about_once_a_second(start: Start) -> None:
    engine, owner = start(step_seconds=0.001)
    engine.submit(make_request(1, max_new_tokens=3))
    owner.wait(lambda: any(stats.generated_tokens == 3 and stats.running == 0 for stats in owner.stats))
    engine.submit(make_request(2, **_FOREVER))
    owner.wait(lambda: any(stats.running for stats in owner.stats))


def test_an_idle_engine_takes_no_steps(start: Start) -> None:
    engine, owner = start()
    engine.submit(make_request(1))
    owner.wait(lambda: owner.is_over(1))
    before = engine.control("stats", {})["steps"]
    assert engine.control("check", {}) == {"ok": True}
    assert engine.control("stats", {})["steps"] == before == 4


def test_bad_control_commands_are_refused_and_hurt_nobody(start: Start) -> None:
    engine, owner = start()
    with pytest.raises(ValidationError, match="reboot"):
        engine.control("reboot", {})
    request = make_request(1)
    engine.submit(request)
    owner.wait(lambda: owner.is_over(1))
    assert engine.control("adapters", {}) == {"adapters": []}


def test_control_gives_up_after_its_timeout(start: Start) -> None:
    engine, owner = start(step_seconds=0.5)
    engine.submit(make_request(1, **_FOREVER))
    owner.wait(lambda: owner.of(1))
    with pytest.raises(EngineDeadError, match=r"did not answer 'stats' within 0\.01 s"):
        ask_until_refused(engine, timeout=0.01)


def test_an_engine_whose_steps_all_fail_tells_its_owner_once_and_refuses_more(start: Start) -> None:
    engine, owner = start(fail_result=(0, 1, 2))
    for handle in range(3):
        engine.submit(make_request(handle))
        owner.wait(lambda handle=handle: owner.is_over(handle) or owner.deaths)
    owner.wait(lambda: owner.deaths)
    assert "3 steps in a row failed" in owner.deaths[0]
    assert not engine.alive
    with pytest.raises(EngineDeadError, match="3 steps in a row failed"):
        engine.submit(make_request(9))
    with pytest.raises(EngineDeadError):
        engine.control("stats", {})
    engine.cancel(1)
    engine.stop()
    assert len(owner.deaths) == 1


def test_an_owner_that_fails_to_take_outputs_is_told_that_the_engine_is_dead(start: Start) -> None:
    class FaultyOwner(RecordingOwner):
        def on_outputs(self, outputs: list[TokenOutput]) -> None:
            raise KeyError("lost")

    engine, owner = start(FaultyOwner())
    engine.submit(make_request(1))
    owner.wait(lambda: owner.deaths)
    assert "lost" in owner.deaths[0]
    assert not engine.alive


def test_stopping_ends_everything_without_a_word(start: Start) -> None:
    engine, owner = start(step_seconds=0.001)
    engine.submit(make_request(1, **_FOREVER))
    owner.wait(lambda: owner.of(1))
    engine.stop()
    produced = len(owner.outputs)
    assert not engine.alive
    assert owner.deaths == []
    with pytest.raises(EngineDeadError, match="stopped"):
        engine.submit(make_request(2))
    engine.stop()
    assert len(owner.outputs) == produced


def test_a_model_that_cannot_be_loaded_is_a_readable_error(engine_class: type[Any]) -> None:
    lines: list[str] = []
    engine = engine_class(FakeEngineBuilder(fault="raise"), lines.append)
    owner = RecordingOwner()
    with pytest.raises(RuntimeError, match=r"^model_id: no such model$"):
        engine.start(owner)
    assert lines == ["loading weights 1/2", "loading weights 2/2"]
    assert not engine.alive
    with pytest.raises(RuntimeError, match="no info yet"):
        _ = engine.info
    engine.stop()
    assert owner.deaths == []


def test_a_builder_that_exits_is_an_error_of_start(engine_class: type[Any]) -> None:
    with pytest.raises(RuntimeError, match="gone while loading"):
        engine_class(FakeEngineBuilder(fault="exit")).start(RecordingOwner())


def test_a_progress_callback_that_fails_is_not_the_end(engine_class: type[Any]) -> None:
    def fail(line: str) -> None:
        raise KeyError(line)

    engine = engine_class(FakeEngineBuilder(), fail)
    engine.start(RecordingOwner())
    assert engine.alive
    engine.stop()


def test_an_engine_stopped_while_it_loads_does_not_start(engine_class: type[Any]) -> None:
    reached, stopped = threading.Event(), threading.Event()

    def block(line: str) -> None:
        reached.set()
        assert stopped.wait(_TIMEOUT_S)

    engine, owner = engine_class(FakeEngineBuilder(), block), RecordingOwner()
    errors: list[Exception] = []

    def start_engine() -> None:
        try:
            engine.start(owner)
        except RuntimeError as error:
            errors.append(error)

    starter = threading.Thread(target=start_engine)
    starter.start()
    assert reached.wait(_TIMEOUT_S)
    engine.stop(timeout=0.05)
    stopped.set()
    starter.join(_TIMEOUT_S)
    assert errors
    assert not engine.alive
    assert owner.deaths == []


def test_an_engine_starts_once_only(start: Start) -> None:
    engine, owner = start()
    with pytest.raises(RuntimeError, match="once only"):
        engine.start(owner)
    assert engine.alive


def test_an_engine_that_was_never_started_refuses_and_stops(engine_class: type[Any]) -> None:
    engine = engine_class(FakeEngineBuilder())
    with pytest.raises(EngineDeadError, match="has not been started"):
        engine.submit(make_request(1))
    engine.cancel(1)
    engine.stop()


def test_a_killed_process_is_reported_at_once_with_its_signal() -> None:
    engine, owner = ProcessEngine(FakeEngineBuilder(step_seconds=0.001)), RecordingOwner()
    engine.start(owner)
    engine.submit(make_request(1, **_FOREVER))
    owner.wait(lambda: owner.of(1))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    owner.wait(lambda: owner.deaths)
    assert "SIGKILL" in owner.deaths[0]
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        engine.submit(make_request(2))
    engine.stop()
    assert len(owner.deaths) == 1


def test_a_process_killed_while_loading_is_an_error_of_start() -> None:
    engine: ProcessEngine

    def kill(line: str) -> None:
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)

    engine = ProcessEngine(FakeEngineBuilder(progress=("loading",) * 10_000), kill)
    with pytest.raises(RuntimeError, match="killed by SIGKILL"):
        engine.start(RecordingOwner())


def test_signals_of_the_terminal_are_left_to_the_parent() -> None:
    engine, owner = ProcessEngine(FakeEngineBuilder()), RecordingOwner()
    engine.start(owner)
    assert engine.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.pid, number)
    request = make_request(1)
    engine.submit(request)
    owner.wait(lambda: owner.is_over(1))
    owner.assert_answered(request)
    engine.stop()


def test_a_process_that_does_not_stop_is_killed() -> None:
    engine, owner = ProcessEngine(FakeEngineBuilder(step_seconds=60.0)), RecordingOwner()
    engine.start(owner)
    engine.submit(make_request(1))
    with pytest.raises(EngineDeadError, match="did not answer"):
        ask_until_refused(engine, timeout=0.2)
    engine.stop(timeout=0.2)
    assert engine._child is not None
    assert engine._child.returncode == -signal.SIGKILL
    assert owner.deaths == []


def test_no_thread_of_the_engine_process_has_a_turn_as_long_as_a_step() -> None:
    with pytest.raises(RuntimeError, match=r"turns of 0\.0005 s"):
        ProcessEngine(FakeEngineBuilder(fault="tell")).start(RecordingOwner())


def test_a_builder_that_cannot_be_pickled_is_a_readable_error() -> None:
    with pytest.raises(RuntimeError, match=r"the engine process cannot be started: .*pickle"):
        ProcessEngine(lambda progress: FakeEngineBuilder()(progress)).start(RecordingOwner())


_ORPHAN_SCRIPT = """
import os, sys, threading
sys.path[:0] = {paths!r}
from fakes_engine import FakeEngineBuilder
from recording_owner import RecordingOwner
from lorax_backend.engine.process import ProcessEngine
engine = ProcessEngine(FakeEngineBuilder())
# Started from a thread that ends: the child must outlive that thread, but not the process.
starter = threading.Thread(target=engine.start, args=(RecordingOwner(),))
starter.start()
starter.join()
assert engine.control("check", {{}}) == {{"ok": True}}
os.write(1, b"%d\\n" % engine.pid)
sys.stdin.read()
"""


def test_the_engine_process_dies_with_its_parent_even_by_kill_and_not_with_the_thread_that_started_it() -> (
    None
):
    """Run as a script without a main guard, which a process that imports the main module again would start twice."""
    here = Path(__file__).resolve()
    script = _ORPHAN_SCRIPT.format(paths=[str(here.parents[2])])
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdin is not None
    try:
        pid = int(parent.stdout.readline())
        descriptor = os.pidfd_open(pid)
        parent.kill()
        readable, _, _ = select.select([descriptor], [], [], _TIMEOUT_S)
        assert readable, "the engine process outlived its parent"
        os.close(descriptor)
    finally:
        parent.kill()
        parent.wait()
        parent.stdin.close()
        parent.stdout.close()


def test_an_embedding_program_finds_the_interpreter_of_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/triton_python_backend_stub")
    assert Path(python_executable()).name.startswith("python")
    monkeypatch.setattr(sys, "prefix", "/nonesuch")
    monkeypatch.setattr(sys, "base_prefix", "/nonesuch")
    with pytest.raises(RuntimeError, match="no Python interpreter among"):
        python_executable()


def test_the_parent_of_an_engine_process_does_not_load_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from lorax_backend.config import load_config; "
        "from lorax_backend.engine.build import create_engine; "
        "create_engine(load_config({'engine_process': 'true'}, {}), Path('x')); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
