"""The report is one safe, self-contained page, with charts where there is something to draw."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedipfs.observe.report import render
from fedipfs.observe.svg import Series, line_chart, nice_ticks

VOID = {"meta"}
SUMMARY: dict[str, Any] = {
    "run_id": "r1",
    "experiment": "mnist",
    "dataset": "mnist",
    "strategy": "fedavg",
    "engine": "local",
    "rounds_completed": 3,
    "final_model_cid": "bafymodel",
    "head_cid": "bafyhead",
    "metrics": {"loss": 0.04, "accuracy": 0.98},
    "seconds": {"total": 47.3},
    "bytes": {"flower_per_client_round": 1834, "store_put": 92_500_000, "store_get": 105_000_000},
    "peak_rss_mb": 612,
    "privacy": {"epsilon": 3.0},
    "status": "finished",
}


def line(number: int) -> dict[str, Any]:
    return {
        "round": number,
        "seconds": 9.5,
        "train": {"train_loss": 0.5 / number, "num-examples": 60000},
        "evaluate": {"accuracy": 0.8},
        "server": {"loss": 0.4 / number, "accuracy": 0.9},
        "clients": {
            "selected": 10,
            "ok": 9,
            "failed": [{"client": "client-3", "reason": "<script>alert(1)</script>"}],
        },
        "bytes": {"flower_per_client": 1834, "store_put": 1e6, "store_get": 2e6},
        "model_cid": f"bafymodel{number}",
        "record_cid": f"bafyrecord{number}",
    }


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_what_the_run_did() -> None:
    page = Page(render(SUMMARY, [line(number) for number in (1, 2, 3)], "rounds: 3\n# <b>&"))
    for text in ("mnist", "r1", "fedavg", "finished", "0.9800", "47.3 s", "1.8 kB", "92.5 MB",
                 "612 MB", "bafymodel", "bafyhead", "bafyrecord2", "client-3", "epsilon",
                 "<script>alert(1)</script>", "rounds: 3\n# <b>&", "92,500,000"):  # fmt: skip
        assert text in page.text
    assert page.tags.count("svg") == 4  # accuracy, loss, seconds, store
    assert page.tags.count("svg") == page.tags.count("desc")
    assert "num-examples" not in page.text
    assert "script" not in page.tags


def test_nothing_is_fetched_from_elsewhere() -> None:
    text = render(SUMMARY, [line(1)], "a: 1")
    page = Page(text)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "srcset"} & {name for name, _ in page.attributes}
    assert "url(" not in text
    assert "@import" not in text


@pytest.mark.parametrize(
    "summary", [{}, {"status": "failed", "bytes": None, "metrics": None, "error": "no data"}]
)
def test_a_run_without_a_round_has_a_page(summary: dict[str, Any]) -> None:
    page = Page(render(summary, [], ""))
    assert str(summary.get("error", "")) in page.text
    assert "svg" not in page.tags
    assert "Configuration" in page.text


@given(st.text())
def test_any_text_is_escaped(text: str) -> None:
    hostile = {**line(1), "server": {text: 0.5}, "model_cid": text}
    hostile["clients"]["failed"] = [{"client": text, "reason": text}]
    summary = {**SUMMARY, "run_id": text, "status": text, "privacy": {text: text}}
    page = Page(render(summary, [hostile, line(2)], text))
    plain = Page(render(SUMMARY, [{**line(1), "server": {"x": 0.5}}, line(2)], ""))
    assert set(page.tags) <= set(plain.tags)


def test_values_that_are_not_finite_are_left_out() -> None:
    nan, inf = float("nan"), float("inf")
    svg = line_chart(
        "a", "loss", [Series("x", [(1, 0.5), (2, nan), (3, inf), (4, 0.25), (5, 1e308)])]
    )
    assert svg.count("<circle") == 2
    assert "nan" not in svg
    assert line_chart("a", "loss", [Series("x", [(1, nan)])]) == ""
    assert line_chart("a", "loss", []) == ""


def test_one_round_and_a_thousand_draw() -> None:
    assert line_chart("a", "loss", [Series("x", [(1, 0.5)])]).count("<circle") == 1
    long = line_chart("a", "loss", [Series("x", [(n, 1 / n) for n in range(1, 1001)])])
    assert "<circle" not in long
    assert long.count('class="tick mid"') <= 12


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
@example(0.0, 5e-324)
def test_ticks_enclose_what_is_drawn(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 8
    slack = (ticks[1] - ticks[0]) * 1e-6 + 1e-9
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    assert ticks == sorted(set(ticks))
