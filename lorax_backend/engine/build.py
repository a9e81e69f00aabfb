"""The composition root: the one place that makes the real parts of an engine and joins them.

Nothing heavy is imported before a builder runs, so the parent of an engine process never loads torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lorax_backend.config import ServerConfig
from lorax_backend.engine.client import BuiltEngine
from lorax_backend.engine.core import EngineCore, EngineSettings
from lorax_backend.engine.loop import InProcessEngine
from lorax_backend.engine.process import ProcessEngine
from lorax_backend.engine.protocols import EngineClient
from lorax_backend.scheduler.settings import SchedulerSettings, parse_weights

_NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/dxg")


def create_engine(
    config: ServerConfig, model_path: Path, progress: Callable[[str], None] | None = None
) -> EngineClient:
    """An engine for the model folder `model_path`, not started yet; in a process of its own if the configuration or
    the device asks for one. `progress` gets short lines while the model loads, from a thread of the engine's."""
    build = partial(build_engine, config, model_path)
    if _has_own_process(config):
        return ProcessEngine(build, progress, config.log_level)
    return InProcessEngine(build, progress)


def build_engine(config: ServerConfig, model_path: Path, progress: Callable[[str], None]) -> BuiltEngine:
    """Load the model and make the core around it; blocks for as long as that takes."""
    from lorax_backend.adapters.manager import AdapterManager
    from lorax_backend.model.lora import lora_targets
    from lorax_backend.model.runner import TorchModelRunner

    started = time.monotonic()
    weights = parse_weights(config.adapter_weights)
    runner = TorchModelRunner(config, model_path, progress)
    if runner.device.type == "cuda":
        # A step computes nothing on processors, and threads that lay out adapters, each with a team of its own, would
        # keep the step's thread from running.
        runner.use_one_processor_a_thread()
    try:
        targets = lora_targets(runner.model_config)
        adapters = AdapterManager(
            config, targets, runner.layout, runner.dtype, runner.arena, writer=runner.page_writer
        )
    except BaseException:
        runner.close()
        raise
    limits = runner.limits
    info = runner.info(time.monotonic() - started)
    scheduler = SchedulerSettings(
        num_blocks=runner.num_blocks,
        block_size=config.block_size,
        max_num_seqs=limits.max_num_seqs,
        max_batch_tokens=limits.max_batch_tokens,
        max_input_length=limits.max_input_length,
        max_total_tokens=limits.max_total_tokens,
        chunked_prefill=config.chunked_prefill,
        prefix_caching=config.prefix_caching,
        adapter_cycle_time_s=config.adapter_cycle_time_s,
        max_running_per_adapter=config.max_running_per_adapter,
        max_queued_per_adapter=config.max_queued_per_adapter,
        small_step_tokens=max(info.prefill_graph_tokens, default=0),
        adapter_weights=weights,
    )
    overlaps = config.overlap and runner.device.type == "cuda"
    settings = EngineSettings(scheduler, 2 if overlaps else 1, vocab_size=runner.model_config.vocab_size)
    core = EngineCore(runner, adapters, settings)
    return BuiltEngine(core, info)


def _has_own_process(config: ServerConfig) -> bool:
    """`auto` means on CUDA. Whether there is a GPU is told by its device files, since asking torch would load it; a
    wrong guess costs nothing but the process."""
    if config.engine_process != "auto":
        return config.engine_process == "true"
    return config.device == "cuda" or (config.device == "auto" and any(map(os.path.exists, _NVIDIA_DEVICES)))
