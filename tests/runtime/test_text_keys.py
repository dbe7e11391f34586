"""Joint attention with text tokens as keys alone takes windows: PRX by plans and as a bundle."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditfastattn import CfgLayout, Strategy, load
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.windows.window import TileWindow
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.tools.zoo.families.prx import MODELS
from tests.export.helpers import export_tiny
from tests.helpers import (
    TinyModel,
    capture_every_site,
    largest_difference,
    make_plan,
    run_plan,
    timestep,
    uniform_strategies,
)

(_MODEL,) = MODELS
PRX = replace(_MODEL, config=_MODEL.config | {"time_factor": 1.0})  # timesteps up to 900


@functools.cache
def tiny_prx() -> TinyModel:
    """Return PRX with two layers, 16 image tokens behind the text's."""

    def call(step: int, batch: int) -> dict[str, Any]:
        return PRX.call(batch, float(timestep(step, batch)[0])) | {"return_dict": False}

    return TinyModel(PRX.build(0), call)


def test_both_attentions_are_joint_with_windows_over_the_grid() -> None:
    _, sites = capture_every_site(tiny_prx())
    joint = [site for site in sites if site.kind is SiteKind.JOINT]
    assert [(site.tokens, site.image_tokens, site.grid) for site in joint] == [(16, 16, (4, 4))] * 2
    assert {site.text_queries for site in joint} == {False}
    assert all(site.text[0] > 0 and site.text[1] == 0 for site in joint)
    assert all(any(isinstance(form, TileWindow) for form in site.windows) for site in joint)


@pytest.mark.parametrize("layout", [CfgLayout.COND_FIRST, CfgLayout.UNCOND_FIRST])
@pytest.mark.parametrize("strategy", [Strategy.WINDOW, Strategy.WINDOW_SHARE_CFG])
def test_windows_equal_the_reference(strategy: Strategy, layout: CfgLayout) -> None:
    tiny = tiny_prx()
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, strategy)
    expected = tiny.reference(rows, sites, layout)
    found = run_plan(tiny, make_plan(tiny, rows, layout, feed_forwards=True))
    assert largest_difference(found, expected) < 1e-5
    assert largest_difference(expected, tiny.run(tiny.model)) > 1e-4


@pytest.mark.slow  # by default the forms are compiled in tests/passes/windows/test_text_keys.py
def test_compiled_windows_equal_the_reference() -> None:
    tiny = tiny_prx()
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, Strategy.WINDOW)
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    plan = make_plan(tiny, rows, feed_forwards=True)
    assert largest_difference(run_plan(tiny, plan, Lowering.INDUCTOR), expected) < 1e-5


def test_a_bundle_equals_the_reference(tmp_path: Path) -> None:
    tiny = tiny_prx()
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, Strategy.WINDOW)
    export_tiny(tiny, rows, tmp_path)
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(load(tmp_path)), expected) < 1e-4
