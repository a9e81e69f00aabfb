"""Compiling the kernels of a start ahead: the right ones, and nothing lost when it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from lorax_backend.model import compile_ahead
from lorax_backend.model.compile_ahead import CompileAhead, most_processes, note_key
from lorax_backend.model.config import ModelConfig
from lorax_backend.model.rehearsal_plan import StartPlan
from lorax_backend.model.startup import StartTimes
from lorax_kernels.device_facts import DeviceFacts
from lorax_kernels.specializations import is_cached

TESTS = Path(__file__).parents[2]
FACTS = DeviceFacts("a device", (9, 0), 132)
Helper = Callable[..., CompileAhead]


@pytest.fixture
def plan(tiny_model_path: Callable[..., Path]) -> StartPlan:
    model = ModelConfig.from_folder(tiny_model_path())
    return StartPlan(FACTS, model, "bfloat16", 16, 17, 4, 256, 16, (1, 4), ())


@pytest.fixture
def started(plan: StartPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Helper:
    """`started(message, ..., report=)`: with a process that only says this, in JSON, and ends."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))

    def start(*messages: dict[str, object], **options: object) -> CompileAhead:
        lines = "\n".join(map(json.dumps, messages)) + "\n"
        boot = f"import sys; sys.stdin.buffer.read(); sys.stdout.write({lines!r})"
        monkeypatch.setattr(compile_ahead, "_BOOT", boot)
        return CompileAhead(plan, 2, **options)  # type: ignore[arg-type]

    return start


def job(number: int, **told: object) -> dict[str, object]:
    return {"job": number, "name": f"kernel_{number}", **told}


def test_launches_on_real_tensors_are_the_rehearsed_ones_and_find_what_was_compiled_ahead(
    tiny_model_path: Callable[..., Path], tmp_path: Path
) -> None:
    # Wide enough to use tensor cores, with heads as llama has them.
    folder = tiny_model_path(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2
    )
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, str(TESTS / "rehearsed_launches.py"), str(folder)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["missing"] == []
    assert len(found["launched"]) > 10
    assert {"decode_kernel", "prefill_kernel", "greedy_kernel", "bgmv_shrink_kernel"} <= set(
        found["launched"]
    )
    assert {"sgmv_expand_kernel", "_write_pages_kernel"} <= set(found["rehearsed"])
    assert found["hits"] == [True, True]
    assert found["told"].startswith("kernels: ")


def test_what_was_compiled_ahead_is_told_with_the_time_it_was_waited_for(started: Helper) -> None:
    reports: list[str] = []
    ahead = started(
        {"first": 1}, job(0), {"total": 3, "problems": []},
        job(1, hash="ab", hit=False), job(2, hash="cd", hit=True), report=reports.append,
    )  # fmt: skip
    ahead.wait_for_attention()
    ahead.wait()
    told = ahead.close()
    assert told.startswith("kernels: 1 compiled ahead in ")
    assert told.endswith("1 in Triton's cache, 0 compiled later")
    assert all(text.startswith("compiling kernels, ") for text in reports)
    assert reports


def test_a_start_whose_kernels_are_noted_in_the_cache_starts_no_process(
    started: Helper, plan: StartPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.cache import get_cache_manager

    files = get_cache_manager("ab" * 32)
    files.put_group("kernel_0.json", {"kernel_0.json": files.put("{}", "kernel_0.json", binary=False)})
    first = started({"first": 1, "total": 1}, job(0, hash="ab" * 32, hit=False))
    first.wait()
    first.close()
    monkeypatch.setattr(compile_ahead, "python_executable", lambda: pytest.fail("a process was started"))
    again = CompileAhead(plan, 2)
    again.wait_for_attention()
    again.wait()
    assert again.close() == "kernels: all in Triton's cache, 0 compiled later"
    Path(files.get_file("kernel_0.json")).unlink()
    assert not is_cached("ab" * 32, "kernel_0")


@pytest.mark.parametrize(
    "failure", [job(0, error="it crashed"), {"problems": ["ValueError: a part was left out"], "total": 0}]
)
def test_a_start_that_could_not_compile_all_is_not_noted(started: Helper, failure: dict[str, object]) -> None:
    for _ in range(2):
        ahead = started({"first": 0}, {"total": 1}, failure)
        ahead.wait()
        assert "cache, 0 compiled later" not in ahead.close()


def test_a_process_that_ends_too_soon_costs_a_warning(
    started: Helper, caplog: pytest.LogCaptureFixture
) -> None:
    ahead = started({"first": 2}, job(0))
    ahead.wait_for_attention()
    ahead.wait()
    assert ahead.close() == "kernels: 0 compiled one by one (the process that compiles ahead has ended)"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_what_the_process_cannot_do_is_told_in_its_words(started: Helper) -> None:
    ahead = started({"failed": "ImportError: no such thing"})
    ahead.wait()
    assert "(ImportError: no such thing)" in ahead.close()


def test_a_process_that_takes_for_ever_is_given_up(
    plan: StartPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_ahead, "_BOOT", "import sys; sys.stdin.read(); import time; time.sleep(600)")
    monkeypatch.setattr(compile_ahead, "_PATIENCE_S", 0.0)
    ahead = CompileAhead(plan, 2)
    ahead.wait()
    assert "took more than" in ahead.close()


def test_a_process_that_cannot_be_started_costs_a_warning(
    plan: StartPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_ahead, "python_executable", lambda: str(tmp_path / "missing"))
    ahead = CompileAhead(plan, 2)
    ahead.wait()
    assert "FileNotFoundError" in ahead.close()


def test_kernels_compiled_at_their_launch_are_counted_and_others_still_told(started: Helper) -> None:
    heard: list[bool] = []
    knobs = triton.knobs.compilation
    before, knobs.listener = knobs.listener, lambda *, cache_hit, **kwargs: heard.append(cache_hit)
    try:
        mine = knobs.listener
        ahead = started({"first": 0, "total": 1}, job(0, hash="ab", hit=False))
        ahead.wait()
        for hit in (True, False, False):
            knobs.listener(src=None, cache_hit=hit, metadata={}, metadata_group={}, times=None)
        assert ahead.close().endswith("2 compiled later")
        assert heard == [True, False, False]
        assert knobs.listener is mine
    finally:
        knobs.listener = before


def test_a_note_is_for_one_plan_and_environment(plan: StartPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    key = note_key(plan)
    assert note_key(plan) == key
    assert note_key(replace(plan, device=replace(FACTS, multiprocessors=114))) != key
    monkeypatch.setenv("LORAX_GEMM_CONFIG", "{}")
    assert note_key(plan) != key


def test_a_crashing_compiler_takes_only_its_own_kernel_along() -> None:
    program = """if True:
        import os, signal
        from lorax_backend.model.compile_process import Workers
        workers = Workers(2, 1)
        workers.add([
            ("good", lambda: {"hash": "ab", "hit": False}),
            ("crashes", lambda: os.kill(os.getpid(), signal.SIGKILL)),
            ("raises", lambda: {}["missing"]),
            ("last", lambda: {"hash": "cd", "hit": True}),
        ])
        workers.finish()
    """
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = sorted(map(json.loads, done.stdout.splitlines()), key=lambda message: message["job"])
    assert [message["job"] for message in told] == [0, 1, 2, 3]
    assert told[0] == {"job": 0, "name": "good", "hash": "ab", "hit": False}
    assert told[1]["error"] == "its compiler was killed by signal 9"
    assert told[2]["error"].startswith("KeyError")
    assert told[3]["hit"]


def test_processes_are_as_many_as_asked_for_and_none_where_kernels_are_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert most_processes(5) == 5
    assert most_processes(0) == 0
    assert 0 <= most_processes(-1) <= 16
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert most_processes(5) == 0


def test_without_processes_kernels_are_only_counted(plan: StartPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "python_executable", lambda: pytest.fail("a process was started"))
    ahead = CompileAhead(plan, 0)
    triton.knobs.compilation.listener(src=None, cache_hit=False)
    ahead.wait_for_attention()
    ahead.wait()
    assert ahead.close() == "kernels: 1 compiled one by one"


def test_times_of_a_start_are_told_by_part() -> None:
    heard: list[str] = []
    times = StartTimes(heard.append)
    times("loading weights: 10%")
    times("loading weights: 20%")
    times("capturing decode graphs, 1 of 3")
    assert heard == ["loading weights: 10%", "loading weights: 20%", "capturing decode graphs, 1 of 3"]
    assert list(times._seconds) == ["the device and the configuration", "loading weights"]
