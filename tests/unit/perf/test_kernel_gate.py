"""No kernel's speed is told unless the kernels' tests passed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from kernel_gate import (
    KernelTestRun,
    KernelTestsError,
    device_name,
    digest_of,
    kernel_tests,
    require_green,
)

PERF = Path(__file__).resolve().parents[3] / "perf"
GREEN = "def test_right() -> None:\n    assert True\n"
RED = "def test_wrong() -> None:\n    assert 1 + 1 == 3, 'a kernel is off'\n"
SKIPPED = "import pytest\n\n@pytest.mark.skip(reason='needs a device')\ndef test_right() -> None: ...\n"


def gate(folder: Path, text: str, kernel: str = "fast = 1") -> Any:
    """Run the gate over one test file and one kernel, with the stamp beside them."""
    test, source = folder / "test_fake_kernel.py", folder / "kernel.py"
    test.write_text(text)
    source.write_text(kernel)
    return require_green([test], [test, source], folder / "stamp.json", "a device")


def test_green_tests_open_the_gate_and_are_counted(tmp_path: Path) -> None:
    run = gate(tmp_path, GREEN)
    assert (run.passed, run.failed, run.skipped) == (1, 0, 0)


def test_red_tests_shut_it_with_what_failed(tmp_path: Path) -> None:
    with pytest.raises(KernelTestsError, match="red, 1 failed") as caught:
        gate(tmp_path, RED)
    assert "a kernel is off" in str(caught.value)
    assert not (tmp_path / "stamp.json").exists()


def test_tests_that_are_all_skipped_have_not_run(tmp_path: Path) -> None:
    with pytest.raises(KernelTestsError, match="did not run: 1 skipped"):
        gate(tmp_path, SKIPPED)


def test_a_file_that_cannot_be_imported_shuts_it(tmp_path: Path) -> None:
    with pytest.raises(KernelTestsError, match=r"red|did not run"):
        gate(tmp_path, "import there_is_no_such_module\n")


def test_a_stamp_spares_the_run_until_a_kernel_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = gate(tmp_path, GREEN)
    with monkeypatch.context() as patched:
        patched.setattr("kernel_gate._run", lambda *_: pytest.fail("the tests ran again"))
        assert gate(tmp_path, GREEN) == first
    assert gate(tmp_path, GREEN, kernel="fast = 2").digest != first.digest


def test_a_pass_on_another_device_or_of_another_kernel_is_worth_nothing(tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("fast = 1")
    stamped = {"passed": 1, "failed": 0, "skipped": 0, "seconds": 1.0, "names": ["test_fake_kernel.py"]}
    (tmp_path / "stamp.json").write_text(
        json.dumps(stamped | {"digest": digest_of([source], "another device")})
    )
    test = tmp_path / "test_fake_kernel.py"
    test.write_text(RED)
    with pytest.raises(KernelTestsError, match="red"):
        require_green([test], [source], tmp_path / "stamp.json", "a device")


def test_a_pass_counts_only_for_the_settings_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = device_name()
    monkeypatch.setenv("LORAX_LORA_CONFIG", '{"shrink": "fused"}')
    assert device_name() != plain


def test_the_gate_runs_every_file_of_the_kernels_tests() -> None:
    names = {path.name for path in kernel_tests()}
    assert {"test_gpu_lora.py", "test_gpu_attention.py"} <= names
    assert "test_gpu_runner.py" not in names


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """perf/kernels.py with measurements that need no device. Not under its own name, which breaks transformers."""
    spec = importlib.util.spec_from_file_location("perf_kernels_program", PERF / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(PERF))
    spec.loader.exec_module(module)
    row = {"tokens": 1, "adapters": 1, "rank": 16, "floor_us": 1.0, "in_situ_us": 7.0, "base_us": 9.0, "goal_us": 8.0,
           "sites": {"o": 7.0}, "shrink_us": {"o": 3.0}, "expand_us": {"o": 4.0}}  # fmt: skip
    monkeypatch.setattr(module, "measured_floors", lambda: {"copy_gbs": 1.0, "tflops": 1.0})
    monkeypatch.setattr(module, "measure_lora", lambda *_: [row])
    return module


def run_benchmark(module: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> None:
    arguments = ["kernels.py", "--no-attention", "--out", str(out), *words]
    monkeypatch.setattr(module.sys, "argv", arguments)
    module.main()


def test_the_benchmark_measures_nothing_when_the_gate_is_shut(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def shut() -> None:
        raise KernelTestsError("the kernels' tests are red, 2 failed")

    monkeypatch.setattr(benchmark, "require_green", shut)
    monkeypatch.setattr(benchmark, "measure_lora", lambda *_: pytest.fail("it measured"))
    with pytest.raises(SystemExit, match=r"no numbers: .* red, 2 failed"):
        run_benchmark(benchmark, monkeypatch, tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_unchecked_numbers_say_so_in_the_table_and_in_the_file(
    benchmark: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmark, "require_green", lambda: pytest.fail("the gate was asked"))
    run_benchmark(benchmark, monkeypatch, tmp_path, "--unchecked")
    shown = capsys.readouterr().out
    assert "NOT CHECKED" in shown
    assert "KERNEL TESTS NOT CHECKED" in shown
    report = json.loads((tmp_path / "kernels-8b.json").read_text())
    assert report["unchecked"] is True
    assert report["kernel_tests"] is None


def test_checked_numbers_name_the_run_that_proved_them(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = KernelTestRun(41, 0, 2, 3.5, "digest", ("test_gpu_lora.py",))
    monkeypatch.setattr(benchmark, "require_green", lambda: run)
    run_benchmark(benchmark, monkeypatch, tmp_path)
    report = json.loads((tmp_path / "kernels-8b.json").read_text())
    assert (report["unchecked"], report["kernel_tests"]["passed"]) == (False, 41)
