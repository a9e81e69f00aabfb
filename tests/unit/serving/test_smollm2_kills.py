"""Converting the built-in model survives being killed anywhere: the next start makes what the first would have made."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_gguf import tiny_gguf_weights, write_tiny_gguf

from lorax_backend import smollm2

# Converts in forked children, the n-th of which kills itself at the n-th change of the file system or tensor, from an
# empty cache or one with a damaged folder; after each another child starts anew. Prints what every start left behind.
_PROGRAM = """
import hashlib, json, os, shutil, sys
from pathlib import Path
from lorax_backend import smollm2
import gguf, numpy  # once, before the forks

source, root, damaged = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "damaged"
smollm2.find_gguf = lambda: source
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock", "shutil.rmtree"}

def state(folder):
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}
    return [smollm2.verify(folder, full=True), files, sorted(p.name for p in folder.parent.iterdir())]

def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed_at(number, cache):
    count = 0
    def step(event, arguments=("",)):
        nonlocal count
        if event in EVENTS and (event == "fcntl.flock" or str(cache) in str(arguments[0])):
            count += 1
            if count == number:
                os.kill(os.getpid(), 9)
    real = smollm2._bfloat16_bytes
    def one_tensor(values):
        step("open", (cache,))
        return real(values)
    smollm2._bfloat16_bytes = one_tensor
    sys.addaudithook(step)
    smollm2.ensure_smollm2(cache)

results = []
for number in range(1, 1000):
    cache = root / str(number)
    if damaged:
        smollm2.ensure_smollm2(cache)
        (next(cache.glob("smollm2*/")) / "config.json").write_text("{}")
    code = in_child(lambda: killed_at(number, cache))
    again = in_child(lambda: smollm2.ensure_smollm2(cache))
    results.append([code, again, *state(next(cache.glob("smollm2*/")))])
    shutil.rmtree(cache)
    if code == 0:
        break
print(json.dumps(results))
"""


@pytest.mark.parametrize("before", ["empty", "damaged"])
def test_killed_at_any_point_the_next_start_leaves_the_very_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    tiny_gguf = write_tiny_gguf(tmp_path / "package" / "tiny.gguf", tiny_gguf_weights())
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tiny_gguf)
    whole = smollm2.ensure_smollm2(tmp_path / "whole")
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(whole.iterdir())}
    command = [sys.executable, "-c", _PROGRAM, str(tiny_gguf), str(tmp_path / "caches"), before]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert len(results) > 20, "it was killed at every file and tensor"
    assert [code for code, *_ in results] == [-9] * (len(results) - 1) + [0]
    for number, (_, again, problems, files, beside) in enumerate(results, 1):
        assert (again, problems) == (0, []), f"killed at point {number}"
        assert files == expected
        assert [name for name in beside if "partial" in name] == []
