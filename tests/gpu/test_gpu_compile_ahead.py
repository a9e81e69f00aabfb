"""A start on a CUDA device without Triton's cache: everything that it launches has been compiled ahead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROGRAM = """
import sys
from pathlib import Path
from lorax_backend.config import ServerConfig
from lorax_backend.model.runner import TorchModelRunner
config = ServerConfig(
    device="cuda", dtype="bfloat16", compile_processes=8, max_batch_size=40, adapter_pages=16, num_blocks=64,
    max_total_tokens=128, attention="triton",
)
print(TorchModelRunner(config, Path(sys.argv[1])).info(0.0).start_times)
"""


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_a_start_compiles_nothing_itself_and_the_next_one_finds_all(
    tiny_model_path: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    environment = {
        **os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tiny_model_path(architecture))],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        told.append(done.stdout.splitlines()[-1])
    assert " compiled ahead in " in told[0]
    assert told[0].endswith(", 0 compiled later")
    assert told[1].endswith("kernels: all in Triton's cache, 0 compiled later")
