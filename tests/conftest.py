"""Fixtures shared by all tests: the built-in model, the example adapters, and tiny models made on the spot."""

from __future__ import annotations

import os

# Before anything imports torch: spinning OpenMP threads of several test processes slow each other down many times.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
if str(TESTS) not in sys.path:  # lets a test module import the fakes kept beside this file
    sys.path.insert(0, str(TESTS))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct in bfloat16, converted once per user and kept in the normal cache."""
    from lorax_backend.smollm2 import ModelSourceError, ensure_smollm2

    try:
        return ensure_smollm2()
    except ModelSourceError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def adapters_path() -> Path:
    """Folder that holds one real PEFT adapter for SmolLM2 per subfolder."""
    return TESTS / "data" / "adapters"


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """What transformers and PEFT answer, alone and in float32, for the base model and every example adapter."""
    return json.loads((TESTS / "data" / "reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model_path(architecture="llama", seed=0, tokenizer="byte_level", **config)` -> folder of a random model.

    Equal arguments give the same folder within a session. See `tiny_checkpoints.write_tiny_model`.
    """
    from tiny_checkpoints import write_tiny_model

    made: dict[str, Path] = {}

    def make(architecture: str = "llama", **options: Any) -> Path:
        key = json.dumps([architecture, options], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{architecture}")
            made[key] = write_tiny_model(folder, architecture, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_adapter(model_path, rank=8, targets=("q_proj", "v_proj"), seed=0, **config)` -> PEFT folder.

    See `tiny_checkpoints.write_tiny_adapter`. B is not zero, so every adapter changes the logits.
    """
    from tiny_checkpoints import write_tiny_adapter

    def make(model_path: Path, **options: Any) -> Path:
        return write_tiny_adapter(tmp_path_factory.mktemp("tiny-adapter"), model_path, **options)

    return make
