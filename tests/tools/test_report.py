"""Reports: their structure, and what a browser makes of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from ditfastattn import ConfigError
from ditfastattn.passes.graph.slots import Slot, SlotKind
from ditfastattn.passes.plan.slot_schedule import CacheSlot
from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.tools.report.content import (
    Declined,
    PlanSection,
    Report,
    cells,
    merged,
    pictures,
    plan_facts,
)
from ditfastattn.tools.report.of_bench import recorded_contenders
from ditfastattn.tools.report.page import render, write_report
from ditfastattn.tools.savings import Prices
from tests.tools.test_figures import make_plan

VOID = {"meta", "link", "input", "img", "br"}


def a_report() -> Report:
    plan = make_plan(sites=4, steps=9)
    price = {strategy.name: strategy.effort for strategy in strategies()}
    prices = tuple(Prices(unit=unit, step=5.0, sites=(price,) * 4) for unit in ("flops", "seconds"))
    dense = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    section = PlanSection(
        name="loose <plan>",
        plan=plan,
        facts=plan_facts(plan),
        prices=(prices[0], prices[1]),
        errors=(((0.0425, 0.0, None, None),) * 9),
        caches=(CacheSlot(Slot("blocks.0", SlotKind.OUTPUT), (1,), "float32", 2**20, ((0, 5),)),),
        declined=(Declined("blocks.1", "no window", "a mask depends on the query"),),
        pictures=pictures(dense, dense.flip(0)),
    )
    return Report(
        title="ditfastattn demo: a & b",
        facts=(("images", "2"),),
        sections=(section, replace(section, name="strict")),
        frontier={"plans": [(1.0, 1.0, "dense"), (2.0, 0.9, "loose")]},
        quality="SSIM",
        environment={"torch": "2"},
        tables={"Measured": (("", "dense"), ("speedup", "1x"))},
    )


class Structure(HTMLParser):
    """Check that elements are closed in order, and collect ids, links and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "xlink:href"):
                self.links.append(value or "")
            elif name == "data-details":
                self.cells.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_is_one_whole_page_that_needs_no_network() -> None:
    page = Structure(render(a_report()))
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "ditfastattn demo: a & b" in page.text
    assert "loose <plan>" in page.text
    assert "a mask depends on the query" in page.text
    assert len(page.cells) == 2 * 4 * 9
    assert "saves 20.0% of the step's FLOPs" in " ".join(page.cells)  # a shared site of price 1 / 5
    assert "changes the site's output by 4.2%; saves" in page.cells[4]
    assert all("changes" not in cell for cell in page.cells[9:36])


def test_a_report_draws_charts_only_of_what_is_known() -> None:
    full, section = a_report(), a_report().sections[0]
    bare = replace(section, prices=None, caches=(), pictures=(), declined=())
    page = render(replace(full, sections=(bare,), frontier={}))
    assert page.count("<svg") == 0
    assert render(full).count("<svg") == 3 + 2  # over all plans, and lifetimes of each
    assert "currentColor" in render(full)  # charts take the page's colours
    assert "saves" not in cells(bare)[0][1][4].details


def test_a_benchmarks_record_puts_its_contenders_into_the_chart() -> None:
    path = Path(__file__).parents[2] / "benchmarks/bench/digits-20.json"
    peers = recorded_contenders(path, "digits", 20, "dense-eager")
    names = [name.partition(" (recorded, ")[0] for name in peers]
    assert {"taylorseer-lite", "fewer-steps"} <= set(names)
    assert "dense-eager" not in names
    drawn = render(replace(a_report(), frontier={**a_report().frontier, **peers}))
    assert "taylorseer-lite (recorded, " in drawn
    with pytest.raises(
        ConfigError, match=r"(?s)other generations.*digits, 20 steps.*digits, 30 steps"
    ):
        recorded_contenders(path, "digits", 30, "dense-eager")


def test_sites_declined_alike_are_one_line() -> None:
    found = merged([Declined(name, "no window", "why") for name in "abc"])
    assert found == (Declined("a and 2 more", "no window", "why"),)


def _browser() -> str | None:
    """Return the system's Chromium; None for playwright's own."""
    names = ("chromium-headless-shell", "chromium", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.mark.slow
def test_a_browser_shows_a_report_without_errors(tmp_path: Path) -> None:
    """Needs playwright and its Chromium, which CI does not install."""
    api: Any = pytest.importorskip("playwright.sync_api")
    write_report(a_report(), tmp_path / "report.html")
    with api.sync_playwright() as running:
        try:
            browser = running.chromium.launch(executable_path=_browser())
        except api.Error as error:
            pytest.skip(f"no browser: {error}")
        complaints: list[str] = []
        for width, scheme in ((400, "dark"), (1280, "light")):
            page = browser.new_page(
                viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
            )
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto((tmp_path / "report.html").as_uri())
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width  # what is wider scrolls by itself
            page.locator(".map .cell").first.focus()
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowDown")
            shown = page.locator(".details").first.text_content()
            assert shown.startswith("step 1, transformer_blocks.1.attn1")
            page.locator(".wipe input").first.focus()
            page.keyboard.press("Home")
            clip = page.locator(".pair .planned").first.evaluate(
                "image => getComputedStyle(image).clipPath"
            )
            assert "0%" in clip or clip == "inset(0px)"
            assert complaints == []
        browser.close()
