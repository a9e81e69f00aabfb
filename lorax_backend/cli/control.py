"""Asking a running server about itself, through Triton's HTTP port. Standard library only."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from lorax_backend.cli.display import Row, byte_size

_MODEL = "lorax"


class ServerUnreachableError(Exception):
    """No answer from the server, or not one of ours; the message says what was tried."""


def ask(url: str, command: str, timeout: float = 10.0) -> dict[str, Any]:
    """Send a control command to the server at `url` ('http://host:port' or 'host:port') and return its answer.

    Raises:
        ServerUnreachableError: nothing answers there within `timeout` seconds, or the answer is an error.
    """
    if "://" not in url:
        url = f"http://{url}"
    target = f"{url.rstrip('/')}/v2/models/{_MODEL}/generate"
    body = json.dumps({"control": json.dumps({"command": command})}).encode()
    request = urllib.request.Request(target, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise ServerUnreachableError(f"{target} answered {error.code}: {_reason(error.read())}") from None
    except http.client.HTTPException:
        raise ServerUnreachableError(
            f"what answers at {url} does not speak HTTP; give Triton's HTTP port (8000 unless --triton-http-port says "
            "otherwise), not the gRPC port"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServerUnreachableError(f"no lorax-triton server answers at {url}: {reason}") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("details"), str):
        raise ServerUnreachableError(f"{target} gave no details: {json.dumps(answer)[:200]}")
    details: dict[str, Any] = json.loads(answer["details"])
    return details


def _reason(body: bytes) -> str:
    """The message inside Triton's error body, which wraps our own error's JSON."""
    text = body.decode(errors="replace")
    for _ in range(2):
        start = text.find("{")
        try:
            text = str(json.loads(text[start:])["error"])
        except (ValueError, KeyError, TypeError):
            break
    return text.strip()[:500]


def info_rows(info: dict[str, Any], adapter_slots: int | None = None) -> list[Row]:
    """Rows for the table of a server's fixed facts, from its `info` answer (EngineInfo as a dict)."""
    slots = f"{adapter_slots} slots, " if adapter_slots is not None else ""
    seen = {name: info.get(name, "?") for name in info}
    rows: list[Row] = [
        (
            "model",
            f"{seen['model_id']} ({seen['model_type']}, {byte_size(info.get('weight_bytes', 0))} of weights)",
        ),
        ("runs on", f"{seen['device']} in {seen['dtype']}"),
        ("attention", _attention(info)),
        ("LoRA kernels", str(seen["lora_backend"])),
        (
            "KV cache",
            f"{seen['num_blocks']} blocks of {seen['block_size']} tokens"
            f" ({byte_size(info.get('kv_cache_bytes', 0))})",
        ),
        (
            "adapters",
            f"{slots}{seen['adapter_pages']} pages of rank {seen['adapter_page_rank']}"
            f" ({byte_size(info.get('adapter_arena_bytes', 0))}), rank up to {seen['max_lora_rank']}",
        ),
        (
            "a request",
            f"up to {seen['max_input_length']} prompt tokens, {seen['max_total_tokens']} with the answer",
        ),
        ("a step", f"up to {seen['max_num_seqs']} sequences and {seen['max_batch_tokens']} tokens"),
    ]
    graphs = info.get("cuda_graph_batch_sizes") or ()
    if graphs:
        rows.append(("CUDA graphs", f"batch sizes {', '.join(map(str, graphs))}"))
    if prefills := info.get("prefill_graph_tokens"):
        rows.append(("prefill graphs", f"steps of up to {', '.join(map(str, prefills))} tokens"))
    return rows


def _attention(info: dict[str, Any]) -> str:
    """The backend, and what computes fresh prompts where that is another one or was measured against one."""
    backend, fresh = str(info.get("attention_backend", "?")), str(info.get("prefill_attention", ""))
    return backend if fresh in ("", backend) else f"{backend}; fresh prompts: {fresh}"


def stats_rows(stats: dict[str, Any]) -> list[Row]:
    """Rows for the table of a server's present state, from its `stats` answer (EngineStats as a dict)."""
    got = {name: stats.get(name, 0) for name in stats}
    prompt = got.get("prompt_tokens", 0)
    hit = (
        f", {100 * got.get('cached_prompt_tokens', 0) / prompt:.0f} % from the prefix cache" if prompt else ""
    )
    return [
        ("requests", f"{got['running']} running, {got['waiting']} waiting"),
        ("KV blocks", f"{got['blocks_used']} of {got['blocks_total']} used, {got['blocks_cached']} cached"),
        (
            "adapters",
            f"{got['adapters_on_device']} on the device, {got['adapters_loading']} loading; "
            f"{got['adapter_pages_used']} of {got['adapter_pages_total']} pages used",
        ),
        ("adapter traffic", f"{got['adapter_loads']} loads, {got['adapter_evictions']} evictions"),
        ("tokens", f"{prompt} prompt{hit}; {got['generated_tokens']} generated"),
        ("steps", f"{got['steps']}, {got['preemptions']} preemptions"),
    ]
