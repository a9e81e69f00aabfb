"""The playground page in a real headless Chromium. Without Chromium on the machine this is skipped, loudly."""

from __future__ import annotations

from pathlib import Path

import pytest
from chromium import Page, find_chromium
from gateway_calls import GatewayCaller

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        find_chromium() is None,
        reason="NO CHROMIUM: the playground is NOT TESTED here; install Debian's package `chromium`",
    ),
]


def test_two_columns_stream_beside_each_other_with_adapters_from_the_live_list(
    gateway: GatewayCaller, gateway_adapter: str, tmp_path: Path
) -> None:
    options = {"max_new_tokens": 20}
    gateway.generate("hello", max_new_tokens=1, adapter_id=gateway_adapter)  # now the server knows it
    page = Page(f"{gateway.url}/playground")
    try:
        page.wait_for(f"adapters.has({gateway_adapter!r})")
        assert page.evaluate("document.querySelectorAll('#adapters option').length") >= 1
        page.evaluate(
            "document.getElementById('prompt').value = 'hello';"
            "document.getElementById('max_new_tokens').value = 20;"
            f"columns[1].adapter.value = {gateway_adapter!r};"
            "columns[1].adapter.dispatchEvent(new Event('change'));"
            "document.getElementById('run').click()"
        )
        assert page.evaluate("columns[1].source.value") == "local"  # taken from the list
        page.wait_for("running === 0 && columns.every(column => column.details)")
        texts = page.evaluate("columns.map(column => column.output.textContent)")
        assert texts == [
            gateway.generate("hello", **options).json["generated_text"],
            gateway.generate("hello", **options, adapter_id=gateway_adapter).json["generated_text"],
        ]
        for facts in page.evaluate("columns.map(column => column.facts.textContent)"):
            assert "prompt" in facts
            assert "first token" in facts
            assert "ended by" in facts
        page.screenshot(tmp_path / "playground.png")
        assert (tmp_path / "playground.png").stat().st_size > 10_000
        assert page.problems == []
    finally:
        page.close()


def test_a_failure_is_shown_in_its_column_alone(gateway: GatewayCaller) -> None:
    page = Page(f"{gateway.url}/playground")
    try:
        page.evaluate(
            "document.getElementById('max_new_tokens').value = 3;"
            "columns[1].adapter.value = '/no/such/adapter'; columns[1].source.value = 'local';"
            "document.getElementById('run').click()"
        )
        page.wait_for("running === 0 && columns[0].details !== null && columns[1].output.textContent !== ''")
        assert page.evaluate("columns.map(column => column.output.classList.contains('error'))") == [
            False,
            True,
        ]
        assert "/no/such/adapter" in page.evaluate("columns[1].output.textContent")
        assert page.problems == []
    finally:
        page.close()
