"""Adapters from a hub and from S3 over real HTTP, through a real tritonserver, with the client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import HubServer
from s3_server import S3Server
from triton_calls import TritonCaller, http_get

from lorax_backend.server.launch import ServerOptions, TritonServer
from lorax_backend.server.repository import write_repository
from lorax_triton import AdapterIncompatibleError, AdapterNotFoundError, AsyncClient, Client, LoraxError

pytestmark = pytest.mark.triton

CLIENTS = 200
PROMPT = "hello world this is"
KEY = "open sesame"
OWNER, THIEF = "hf_canary-of-the-owner", "hf_canary-of-the-thief"
WAIT_S = 120.0


@dataclass
class Place:
    """A server, the hub and the S3 it asks, the files of an adapter to put there, and all that the server may
    write."""

    server: TritonServer
    hub: HubServer
    s3: S3Server
    files: dict[str, bytes]
    folder: Path


@pytest.fixture(scope="module")
def place(
    tiny_llama: Path, tiny_adapters: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("written")
    config = {
        "model_id": str(tiny_llama),
        "device": "cpu",
        "num_blocks": "1200",
        "max_total_tokens": "4096",
        "adapter_disk_cache": str(folder / "disk"),
        "admin_api_key": KEY,
        "engine_process": "false",
    }
    files = {path.name: path.read_bytes() for path in Path(tiny_adapters[0]).iterdir()}
    with HubServer() as hub, S3Server() as s3, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("S3_ENDPOINT_URL", s3.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIA_canary-of-the-server")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-the-bucket")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("HF_HOME", str(folder / "hf"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LORAX_USE_GLOBAL_HF_TOKEN", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        server = TritonServer(
            write_repository(folder / "repository", config), ServerOptions(models=("lorax",))
        )
        server.start()
        try:
            server.wait_ready(WAIT_S)
            yield Place(server, hub, s3, files, folder)
        finally:
            server.terminate(timeout=20.0)


@pytest.fixture
def client(place: Place) -> Iterator[Client]:
    with Client(place.server.grpc_address, timeout=WAIT_S, admin_key=KEY) as client:
        yield client


@pytest.fixture
def caller(place: Place, connect: Callable[[TritonServer], TritonCaller]) -> TritonCaller:
    return connect(place.server)


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline, "it never came to that"
        threading.Event().wait(0.01)  # leave the processors to the server


def refusal(client: Client, adapter_id: str, token: str | None) -> LoraxError:
    with pytest.raises(LoraxError) as caught:
        client.generate(PROMPT, adapter_id, api_token=token, max_new_tokens=2)
    return caught.value


def test_200_clients_of_one_cold_private_adapter_are_one_download(place: Place, caller: TritonCaller) -> None:
    """Every second one has no right to it, and is told so while the others wait."""
    release = threading.Event()
    place.hub.commit("org/crowd", place.files, token=OWNER)
    place.hub.add_fault("GET /org/crowd/resolve", hold=release)
    address = place.server.grpc_address

    async def ask(number: int) -> str:
        async with AsyncClient(address, timeout=WAIT_S) as one:
            token = OWNER if number % 2 else THIEF
            try:
                answer = await one.generate(PROMPT, "org/crowd", api_token=token, max_new_tokens=4, seed=1)
            except AdapterNotFoundError:
                return "refused"
            return "answer " + answer.generated_text

    async def crowd() -> list[str]:
        asked = asyncio.gather(*(ask(number) for number in range(CLIENTS)))
        everybody_came = asyncio.to_thread(
            until, lambda: caller.control("info")["live_requests"] >= CLIENTS // 2 or release.is_set()
        )
        try:
            await everybody_came
        finally:
            release.set()
        return await asked

    outcomes = asyncio.run(crowd())
    assert set(outcomes[::2]) == {"refused"}
    assert len(set(outcomes[1::2])) == 1, "one answer"
    assert outcomes[1].startswith("answer ")
    downloads = Counter(
        path for method, path, _ in place.hub.requests if method == "GET" and "resolve" in path
    )
    assert [count for path, count in downloads.items() if "org/crowd" in path] == [1, 1], (
        "two files, once each"
    )


def test_a49_clients_gone_while_their_adapters_load_or_fail_stop_no_other_load(
    place: Place, client: Client, caller: TritonCaller
) -> None:
    """LoRAX's loader task panicked when it could not tell one of them of a failure."""
    releases = {name: threading.Event() for name in ("bad", "late")}
    place.hub.commit("org/bad", {**place.files, "adapter_model.safetensors": b"broken"})
    place.hub.commit("org/late", place.files)
    place.hub.commit("org/good", place.files)
    for name, release in releases.items():
        place.hub.add_fault(f"GET /org/{name}/resolve", hold=release)
    before = place.hub.count("GET /org/bad/resolve")

    async def leave(name: str) -> None:
        async with AsyncClient(place.server.grpc_address, timeout=WAIT_S) as one:
            asking = asyncio.create_task(one.generate(PROMPT, f"org/{name}", max_new_tokens=2))
            await asyncio.to_thread(until, lambda: place.hub.count(f"GET /org/{name}/resolve") > before)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    for name in releases:
        asyncio.run(leave(name))
    until(lambda: caller.control("info")["live_requests"] == 0)
    assert client.generate(PROMPT, "org/good", max_new_tokens=2).generated_text
    for release in releases.values():
        release.set()
    assert client.generate(PROMPT, "org/late", max_new_tokens=2).generated_text
    assert isinstance(refusal(client, "org/bad", None), AdapterIncompatibleError)
    caller.control("check")


def test_a60_a_cached_private_adapter_looks_like_a_missing_one(
    place: Place, client: Client, caller: TritonCaller
) -> None:
    """LoRAX asked for the right only once per process and adapter (also its documents' claim S0-07)."""
    missing = {token: refusal(client, "org/private", token) for token in (None, THIEF)}
    place.hub.commit("org/private", place.files, token=OWNER)
    assert client.adapters.preload("org/private", api_token=OWNER)["status"] == "ready"
    client.adapters.reload("org/private", api_token=OWNER)  # forgets that it was missing a moment ago
    asked = place.hub.count("/api/models/org/private")
    for token, before in missing.items():
        after = refusal(client, "org/private", token)
        assert (type(after), str(after)) == (type(before), str(before)), token
    assert place.hub.count("/api/models/org/private") - asked >= 2, "both were asked for, as a missing one is"
    assert client.generate(PROMPT, "org/private", api_token=OWNER, max_new_tokens=2).generated_text
    with Client(place.server.grpc_address) as stranger:
        assert "org/private" not in json.dumps([stranger.adapters.list(), caller.control("stats")])
    assert "org/private" in {row["id"] for row in client.adapters.list()}


def test_tokens_are_in_no_log_metric_error_answer_or_file(
    place: Place, client: Client, caller: TritonCaller
) -> None:
    place.hub.commit("org/canary", place.files, token=OWNER)
    place.hub.add_fault("/api/models/org/canary", times=1, status=500)
    shown = [str(refusal(client, "org/canary", THIEF)), str(refusal(client, "org/canary/none", THIEF))]
    bearer = {"Authorization": f"Bearer {OWNER}"}
    with Client(place.server.grpc_address, headers=bearer, timeout=WAIT_S, admin_key=KEY) as owner:
        assert owner.generate(PROMPT, "org/canary", max_new_tokens=2).generated_text
    with pytest.raises(LoraxError) as caught:
        client.adapters.preload("org/nothing", api_token=THIEF)
    shown.append(str(caught.value))
    client.adapters.set_alias("canary", "org/canary")
    shown.append(str(refusal(client, "s3://canary/none", THIEF)))
    commands = ("info", "stats", "adapters", "metrics", "aliases")
    shown += [json.dumps(caller.control(command, admin_key=KEY)) for command in commands]
    shown += [http_get(place.server.metrics_address, "/metrics"), place.server.log_tail(1_000_000)]
    sent = {token for _, _, token in place.hub.requests}
    assert {OWNER, THIEF} <= sent, "the hub did get them"
    for text in shown:
        assert "canary-of" not in text
    written = [path for path in place.folder.rglob("*") if path.is_file()]
    assert any("adapter_model" in path.name for path in written), "the right folder"
    for path in written:
        assert b"canary-of" not in path.read_bytes(), path
        assert "canary-of" not in str(path)


def test_an_adapter_from_s3_streams_the_tokens_of_the_same_one_in_a_folder(
    place: Place, client: Client, tiny_adapters: list[str]
) -> None:
    def stream(adapter_id: str | None, source: str | None) -> list[int]:
        stream = client.generate_stream(PROMPT, adapter_id, source, max_new_tokens=12, ignore_eos_token=True)
        return [response.token.id for response in stream]

    place.s3.put("loras", "team/shout", place.files)
    expected = stream(tiny_adapters[0], "local")
    assert len(expected) == 12
    assert stream("loras/team/shout", "s3") == expected
    assert stream("s3://loras/team/shout", None) == expected, "the address names the source"
    weights = "GET /loras/team/shout/adapter_model.safetensors"
    assert place.s3.count(weights) == 1
    assert stream(None, None) != expected, "the adapter makes a difference"
    with pytest.raises(AdapterNotFoundError, match="loras/team/none"):
        client.generate(PROMPT, "loras/team/none", "s3", max_new_tokens=2)
    (row,) = [row for row in client.adapters.list() if row["source"] == "s3"]
    assert (row["id"], len(row["resolved_revision"])) == ("s3://loras/team/shout", 40)


def test_aliases_set_by_command_are_kept_beside_the_disk_cache(place: Place, client: Client) -> None:
    client.adapters.set_alias("kept", {"org/good": 0.9, "org/late": 0.1})
    (kept,) = (place.folder / "disk").glob("aliases-*.json")
    targets = json.loads(kept.read_text())["aliases"]["kept"]["targets"]
    assert [(target["adapter_id"], target["weight"]) for target in targets] == [
        ("org/good", 0.9),
        ("org/late", 0.1),
    ]
