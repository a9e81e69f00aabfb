"""What the measurements of adapters' lives make of their samples."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from adapter_life_engine import Load, Record
from adapter_life_hub import local_hub
from adapter_life_report import Row, first_error, hit_ratios, rows_of, summarize
from adapter_life_soak import memory_trend
from adapter_life_workloads import poisson, steady, zipf_order

from lorax_backend.types import AdapterRef

MIB = float(1 << 20)


def test_memory_that_fills_up_and_then_stays_is_flat() -> None:
    filling = [(float(t), (400 + min(t, 20) * 10) * MIB) for t in range(100)]
    assert memory_trend(filling)["flat"]


def test_memory_that_grows_slowly_to_the_end_is_not_flat() -> None:
    leaking = [(float(t), (400 + 0.5 * t) * MIB) for t in range(100)]
    trend = memory_trend(leaking)
    assert not trend["flat"]
    assert round(trend["slope_mib_per_min"]) == 30


def test_memory_that_swings_about_a_level_is_flat() -> None:
    rng = random.Random(1)
    assert memory_trend([(float(t), (900 + rng.uniform(-15, 15)) * MIB) for t in range(200)])["flat"]


def test_a_request_counts_as_answered_only_with_all_its_tokens() -> None:
    load = Load(0.0, None, 8, 3)
    whole = Record(load, 1.0, [1.010, 1.020, 1.050], done=True)
    short = Record(load, 1.0, [1.010], done=True)
    failed = Record(load, 1.0, [], "no such adapter", done=True)
    summary = summarize([whole, short, failed])
    assert (summary["requests"], summary["unanswered"]) == (3, 2)
    assert round(summary["ttft_p50"], 3) == 10.0
    assert round(summary["worst_stall"], 3) == 30.0
    assert first_error([whole, failed]) == "no such adapter"
    assert first_error([whole, short]) == "1 tokens instead of 3"
    assert first_error([whole]) is None


def test_the_steady_part_of_a_stream_is_still_answered() -> None:
    record = Record(Load(0.0, None, 8, 12), 0.0, [0.1 * n for n in range(12)], done=True)
    assert len(steady(record, 8).times) == 4
    assert steady(record, 8).answered


def test_goals_are_for_the_measurement_they_were_set_for_only() -> None:
    summary = {"ttft_p50": 31.0, "ttft_p99": 100.0, "itl_p50": 9.0, "itl_p99": 19.0, "worst_stall": 50.0}
    against = {"ttft_p50": (48.0, 30.0), "itl_p99": (75.0, 20.0)}
    judged = {row.name: row.met for row in rows_of("churn", summary, against, judged=True)}
    assert judged == {
        "ttft_p50": False, "ttft_p99": None, "itl_p50": None, "itl_p99": True, "worst_stall": None,
    }  # fmt: skip
    assert all(row.met is None for row in rows_of("churn", summary, against, judged=False))
    assert Row("soak", "requests unanswered", 0, None, 0).met


def test_hit_ratios_are_of_the_requests_between_two_reports() -> None:
    before = {"tier_hits": {"device": 5, "host": 5, "disk": 0}}
    after = {"tier_hits": {"device": 11, "host": 5, "disk": 2}}
    assert hit_ratios(before, after) == {"device": 0.75, "host": 0.0, "disk": 0.25}
    assert set(hit_ratios(before, before).values()) == {0.0}


def test_equal_seeds_give_equal_traffic_and_few_adapters_get_most_of_it() -> None:
    refs = [AdapterRef("local", str(n)) for n in range(200)]
    one, other = (list(itertools.islice(zipf_order(random.Random(3), refs), 2000)) for _ in range(2))
    assert one == other
    counts = sorted((one.count(ref) for ref in refs), reverse=True)
    assert sum(counts[:32]) > 0.6 * len(one)
    times = list(itertools.islice(poisson(random.Random(3), 10.0), 5000))
    assert 450 < times[-1] < 550


def test_the_local_hub_serves_a_folder_as_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorax_backend.adapters.sources.hub import HubSource

    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with local_hub({"org/a": folder}, 0.0) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        fetched = HubSource(cache_dir=str(tmp_path / "cache")).fetch(AdapterRef("hub", "org/a"), None)
    assert (fetched.folder / "adapter_model.safetensors").read_bytes() == b"weights"
