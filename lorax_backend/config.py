"""Configuration, read once at start: the only reader of environment variables.

Every option has one name. It is the field here (`max_total_tokens`), the flag of the CLI (`--max-total-tokens`), the
environment variable (`MAX_TOTAL_TOKENS`) and the key in `config.pbtxt` `parameters` (`max_total_tokens`). A value in
`config.pbtxt` wins over the environment, which wins over the default.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


def _option(default: Any, help_text: str, choices: tuple[str, ...] = (), secret: bool = False) -> Any:
    return field(
        default=default, repr=not secret, metadata={"help": help_text, "choices": choices, "secret": secret}
    )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """All options of a server. 0 or an empty string stands for "work it out at start" where the help says so."""

    model_id: str = _option("smollm2", "base model: hub id (id@revision), folder, or 'smollm2'")
    revision: str = _option("", "hub revision of the base model; empty: main")
    dtype: str = _option(
        "auto", "auto (float32 on CPU, the checkpoint's on CUDA)", ("auto", "float32", "float16", "bfloat16")
    )
    device: str = _option("auto", "auto, cpu or cuda", ("auto", "cpu", "cuda"))
    seed: int = _option(0, "seed of the random weights of load_format=dummy")
    load_format: str = _option(
        "safetensors", "safetensors, or dummy for random weights (benchmarks)", ("safetensors", "dummy")
    )
    tokenizer_id: str = _option("", "tokenizer: hub id or folder; empty: the model's")
    max_input_length: int = _option(0, "longest prompt in tokens; 0: max_total_tokens - 1")
    max_total_tokens: int = _option(0, "longest prompt + answer in tokens; 0: min(model's limit, 4096)")
    max_batch_tokens: int = _option(0, "token budget of one step; 0: 512 on CPU, 8192 on CUDA")
    max_batch_size: int = _option(0, "sequences running at once; 0: 64 on CPU, 256 on CUDA")
    max_concurrent_requests: int = _option(1024, "requests in flight before new ones are refused")
    max_requests_per_adapter: int = _option(
        0, "requests in flight for one adapter before more are refused; 0: no cap"
    )
    queue_timeout_s: float = _option(
        0.0, "seconds a request may wait to be scheduled before it is refused; 0: for ever"
    )
    max_best_of: int = _option(2, "answers a request may have drawn to return the best (best_of)")
    max_n: int = _option(16, "answers a request may have returned (n)")
    max_stop_sequences: int = _option(4, "stop strings a request may name")
    max_prompt_bytes: int = _option(1 << 20, "largest prompt in bytes of UTF-8, checked before tokenization")
    block_size: int = _option(16, "tokens in a KV block")
    num_blocks: int = _option(0, "KV blocks; 0: from free memory")
    kv_cache_memory: float = _option(1.0, "GiB for the KV cache on CPU when num_blocks is 0")
    cuda_memory_fraction: float = _option(0.9, "share of the GPU's memory this server may use")
    chunked_prefill: bool = _option(True, "split long prompts over steps and mix them with decoding")
    prefix_caching: bool = _option(True, "reuse KV blocks of equal prompt prefixes of the same adapter")
    max_active_adapters: int = _option(128, "adapters that can be on the device at once")
    adapter_cycle_time_s: float = _option(
        2.0, "seconds an adapter keeps its room on the device while others wait for room"
    )
    max_running_per_adapter: int = _option(0, "sequences of one adapter that run at once; 0: no cap")
    max_queued_per_adapter: int = _option(
        0, "requests of one adapter that may wait to be started before more are refused; 0: no cap"
    )
    adapter_weights: str = _option(
        "",
        'JSON object, adapter id -> share of the engine, such as {"org/a": 2}; others and __base_model__ have 1',
    )
    max_lora_rank: int = _option(64, "largest adapter rank accepted")
    adapter_pages: int = _option(0, "pages of rank 8 in the device arena; 0: 64 on CPU, from memory on CUDA")
    adapter_memory_fraction: float = _option(0.1, "share of GPU memory for adapters when adapter_pages is 0")
    adapter_host_bytes: int = _option(4 << 30, "bytes of loaded adapters kept in host memory")
    adapter_disk_cache: str = _option(
        "",
        "folder of downloaded adapters; empty: hub_cache if set, else lorax-triton/adapters in the user's cache",
    )
    adapter_disk_bytes: int = _option(
        64 << 30, "bytes of downloaded adapters kept on disk, least recently used out first; not in hub_cache"
    )
    max_adapter_bytes: int = _option(0, "largest adapter in bytes of its files; 0: twice adapter_host_bytes")
    adapter_roots: str = _option(
        "", "folders that adapter_source=local may read, separated by commas; empty: any folder"
    )
    allow_pickle_adapters: bool = _option(
        False, "read adapter_model.bin too, as tensors only (torch.load, weights_only)"
    )
    adapter_auth_ttl_s: float = _option(
        300.0, "seconds a source's word that a token may read an adapter holds; 0: ask for every request"
    )
    default_adapter_source: str = _option(
        "hub", "adapter_source of requests that name none", ("hub", "local", "s3", "pbase")
    )
    adapter_id: str = _option(
        "", "adapter of requests that name none; they get the base model with adapter_id=__base_model__"
    )
    adapter_source: str = _option("", "adapter_source of adapter_id; empty: default_adapter_source")
    preloaded_adapter_ids: str = _option(
        "", "adapters to load and pin at start, separated by commas; others load on demand all the same"
    )
    preloaded_adapter_source: str = _option("", "their adapter_source; empty: default_adapter_source")
    adapter_aliases: str = _option(
        "", 'JSON object, alias -> adapter id, or list of {"adapter_id", "weight"...}; see docs/parameters.md'
    )
    adapter_alias_file: str = _option(
        "",
        "file that keeps aliases set by command over restarts; empty: one in adapter_disk_cache, if that is set",
    )
    admin_api_key: str = _option(
        "",
        "key that control commands which change something must carry as admin_key; give it by the environment, as "
        "Triton shows everybody what config.pbtxt holds",
        secret=True,
    )
    allow_unauthenticated_admin: bool = _option(
        False, "without admin_api_key, let everybody run commands that change something"
    )
    watermark_gamma: float = _option(0.5, "share of the vocabulary that the watermark favours")
    watermark_delta: float = _option(2.0, "added to the logits of favoured tokens")
    adapter_loader_threads: int = _option(4, "adapters downloaded and parsed at once")
    adapter_load_timeout_s: float = _option(120.0, "longest download and parse of one adapter in seconds")
    engine_process: str = _option(
        "auto", "engine in a process of its own: auto (on CUDA), true, false", ("auto", "true", "false")
    )
    sender_threads: int = _option(4, "threads that send responses")
    validation_workers: int = _option(2, "threads that decode and tokenize requests")
    cancel_poll_interval_s: float = _option(0.05, "seconds between two looks for cancelled requests")
    attention: str = _option(
        "auto",
        "attention: triton on CUDA, torch on CPU; prompts that begin in a step may go through torch's flash attention "
        "(torch_varlen), its cuDNN attention (torch_cudnn, long ones alone) or flash-attn instead, if it passes a "
        "check at start; auto takes the fastest",
        ("auto", "torch", "triton", "torch_varlen", "torch_cudnn", "flash_attn"),
    )
    lora_kernels: str = _option(
        "auto", "LoRA kernels: triton on CUDA, torch on CPU", ("auto", "torch", "triton")
    )
    cuda_graphs: bool = _option(True, "capture decode steps as CUDA graphs")
    prefill_graph_tokens: int = _option(
        -1,
        "capture steps with prompt tokens too, up to this many tokens a step (at most 512), to start short answers "
        "sooner; 0: off; -1: 512 on CUDA with cuda_graphs, else off",
    )
    compile_processes: int = _option(
        -1,
        "processes that compile kernels at start on CUDA, all at once; 0: none, each kernel is compiled when it is "
        "launched first; -1: one a processor, 16 at most",
    )
    overlap: bool = _option(True, "launch a step before the tokens of the one before are read (CUDA)")
    hub_cache: str = _option("", "folder of the hub's files; empty: Hugging Face's default")
    log_level: str = _option("info", "log level", ("debug", "info", "warning", "error"))


_ALIASES = {"huggingface_hub_cache": "hub_cache", "hf_model_id": "model_id", "hf_model_revision": "revision"}


def split_secrets(texts: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Options as text, apart: those that may stand in `config.pbtxt`, and, as environment variables, those that may
    not, because Triton shows the configuration of a model to whoever asks."""
    secrets = {option.name for option in fields(ServerConfig) if option.metadata["secret"]}
    shown = {name: text for name, text in texts.items() if name not in secrets}
    return shown, {name.upper(): text for name, text in texts.items() if name in secrets}


def _convert(name: str, kind: str, text: str, choices: tuple[str, ...]) -> Any:
    value = text.strip()
    if kind == "bool":
        if value.lower() in ("1", "true", "yes", "on"):
            return True
        if value.lower() in ("0", "false", "no", "off"):
            return False
        raise ValueError(f"{name}: {text!r} is not true or false")
    if kind in ("int", "float"):
        try:
            return int(value) if kind == "int" else float(value)
        except ValueError:
            raise ValueError(f"{name}: {text!r} is not a number") from None
    if choices and value not in choices:
        raise ValueError(f"{name}: {text!r} is not one of {', '.join(choices)}")
    return value


def load_config(
    parameters: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None
) -> ServerConfig:
    """Build the configuration from `config.pbtxt` parameters and the environment.

    Raises:
        ValueError: naming every option that is unknown or cannot be read.
    """
    environ = os.environ if environ is None else environ
    known = {f.name: f for f in fields(ServerConfig)}
    problems: list[str] = []
    texts: dict[str, str] = {}
    for source in (known, _ALIASES):
        for name in source:
            if environ.get(name.upper(), "") != "":
                texts.setdefault(_ALIASES.get(name, name), environ[name.upper()])
    for name, text in (parameters or {}).items():
        target = _ALIASES.get(name, name)
        if target not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            problems.append(f"{name}: unknown option" + (f"; did you mean {near[0]}?" if near else ""))
        elif text != "":
            texts[target] = text
    values: dict[str, Any] = {}
    for name, text in texts.items():
        option = known[name]
        try:
            values[name] = _convert(name, str(option.type), text, option.metadata["choices"])
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("bad configuration: " + "; ".join(problems))
    return ServerConfig(**values)
