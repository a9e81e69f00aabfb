"""The curl commands of published guides, as written, but for host, model and adapter."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from gateway_calls import GatewayCaller

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        shutil.which("curl") is None, reason="NO CURL: the guides' commands are NOT TESTED here"
    ),
]

PLAIN = """curl -s http://127.0.0.1:8080/generate -X POST \\
  -H 'Content-Type: application/json' \\
  -d '{
    "inputs": "Summarize the role of LoRA adapters in 2 bullet points",
    "parameters": {"max_new_tokens": 80}
  }'"""
WITH_ADAPTER = """curl -s http://127.0.0.1:8080/generate -X POST \\
  -H 'Content-Type: application/json' \\
  -d '{
    "inputs": "Solve: If Natalia sold 48 clips in April and half as many in May, how many in total?",
    "parameters": {
      "max_new_tokens": 64,
      "adapter_id": "vineetsharma/qlora-adapter-Mistral-7B-Instruct-v0.1-gsm8k"
    }
  }'"""
SHORT = """curl "http://127.0.0.1:8080/generate" -H 'Content-Type: application/json' \\
  -d '{"inputs":"hi","parameters":{"adapter_id":"predibase/customer_support"}}'"""


@pytest.mark.parametrize("snippet", [PLAIN, WITH_ADAPTER, SHORT])
def test_the_guides_curl_commands_get_a_text(
    gateway: GatewayCaller, gateway_adapter: str, snippet: str
) -> None:
    command = snippet.replace("http://127.0.0.1:8080", gateway.url)
    for adapter in (
        "vineetsharma/qlora-adapter-Mistral-7B-Instruct-v0.1-gsm8k",
        "predibase/customer_support",
    ):
        command = command.replace(adapter, gateway_adapter)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout)["generated_text"], str)
