"""The search chooses, site by site, the form of window that measures better."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from ditfastattn import CfgLayout, Plan, Strategy, Target, calibrate
from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.passes.windows.window import TileWindow, Window
from ditfastattn.runtime.search.measure.error_table import MAX_GAP
from ditfastattn.runtime.search.measure.latency import CostTable
from ditfastattn.runtime.search.retarget import retarget
from ditfastattn.runtime.search.solve.budget import within_budget
from ditfastattn.runtime.search.solve.problem import Problem
from ditfastattn.runtime.search.solve.window_choice import (
    WindowForm,
    allowed_windows,
    choose_windows,
    with_chosen,
)
from tests.error_tables import GAP_PAIRS, of, table_of
from tests.helpers import capture_every_site, randomize, tiny_digits_pipeline, tiny_dit

STEPS, SITES = 6, 3
GRID = TileWindow(grid=(4, 4), tile=(1, 1), reach=(1, 1))
SEQUENCE = TileWindow(grid=(16,), tile=(1,), reach=(2,))
CALL: dict[str, Any] = {"class_labels": [1, 3], "num_inference_steps": 5, "guidance_scale": 2.0}


def problem(window_errors: tuple[float, ...], window_prices: tuple[float, ...]) -> Problem:
    """Sharing is hopeless, a window has the errors and prices given, by site."""
    shape = (STEPS, STEPS, SITES)
    past = np.tril(np.ones(shape[:2], dtype=bool), -1)[:, :, None]
    window = np.where(past, np.broadcast_to(np.array(window_errors), shape), np.inf)
    never = np.full(shape, np.inf)
    errors = table_of(
        share_step=np.where(past, 50.0, np.inf) * np.ones(shape),
        window=window,
        window_share_cfg=never,
        share_cfg=np.full((STEPS, SITES), np.inf),
        extrapolate=np.full((STEPS, STEPS, MAX_GAP + 1, SITES), np.inf),
        extrapolate_quadratic=np.full((STEPS, STEPS, len(GAP_PAIRS), SITES), np.inf),
    )
    prices = {strategy: np.inf for strategy in strategies()}
    sites = tuple(
        prices | {Strategy.FULL: 4.0, Strategy.SHARE_STEP: 0.0, Strategy.WINDOW: price}
        for price in window_prices
    )
    return Problem(errors, np.ones((STEPS, SITES)), CostTable(20.0, sites, (0.1,) * SITES))


def test_each_site_takes_the_form_of_less_error_and_price() -> None:
    bands = problem((0.1, 0.1, 0.2), (2.0, 1.0, 1.0))
    tiles = problem((0.1, 0.1, 0.1), (1.0, 2.0, 1.0))
    drift = 1.5
    chosen = choose_windows([bands, tiles], drift)
    assert chosen == [1, 0, 1]  # cheaper; dearer; as cheap, of half the error
    both = with_chosen([bands, tiles], chosen)
    assert [prices[Strategy.WINDOW] for prices in both.costs.sites] == [1.0, 1.0, 1.0]
    assert [of(both.errors, "window")[3, 1, site] for site in range(SITES)] == [
        0.1,
        0.1,
        0.1,
    ]
    best = min(each.costs.plan(within_budget(each, drift)) for each in (bands, tiles))
    assert both.costs.plan(within_budget(both, drift)) < best


def test_a_form_may_be_asked_for() -> None:
    _, sites = capture_every_site(tiny_dit())
    assert {site.windows for site in sites if site.windows} == {(2, GRID, SEQUENCE)}

    def left(form: WindowForm, device: str, *windows: Window) -> tuple[Window, ...]:
        given = tuple(replace(site, windows=windows or site.windows) for site in sites)
        kept = {site.windows for site in allowed_windows(given, form, device) if site.window}
        (found,) = kept
        return found

    assert left(WindowForm.BAND, "cpu") == (2,)
    assert left(WindowForm.TILES, "cpu") == (GRID,)
    assert left(WindowForm.TILES, "cpu", 2, SEQUENCE) == (SEQUENCE,)  # no grid
    assert left(WindowForm.TILES, "cpu", 2) == (2,)
    assert left(WindowForm.AUTO, "cpu") == (SEQUENCE, GRID)
    assert left(WindowForm.AUTO, "cuda") == (2, GRID)
    assert left(WindowForm.AUTO, "cpu", 2) == (2,)


def pipeline(sample_size: int = 16) -> Any:
    made = tiny_digits_pipeline(DDIMScheduler(clip_sample=False), sample_size)
    randomize(made.transformer)
    return made


@pytest.mark.parametrize("windows", ["band", "tiles", "auto"])
def test_a_search_plans_the_windows_it_may(windows: str) -> None:
    target = Target.min_ssim(0.2)
    options: Any = {"method": "global", "lowering": "eager"}
    plan = calibrate(pipeline(), CALL, target=target, windows=windows, **options)
    forms = {type(site.window) for site in plan.sites if site.window}
    assert forms == {int if windows == "band" else TileWindow}
    assert plan.changed > 0
    assert Plan.parse(plan.model_dump_json()) == plan


def test_a_retargeted_plan_keeps_its_form() -> None:
    target = Target.min_ssim(0.2)
    options: Any = {"method": "global", "lowering": "eager"}
    plan = calibrate(pipeline(), CALL, target=target, windows="tiles", **options)
    same = retarget(pipeline(), plan, CALL, target=Target.min_ssim(0.001))
    assert [site.window for site in same.sites] == [site.window for site in plan.sites]
    larger = retarget(pipeline(32), plan, CALL, target=Target.min_ssim(0.001))
    forms = {site.window for site in larger.sites if site.window}
    assert forms == {TileWindow(grid=(16, 16), tile=(2, 2), reach=(1, 1))}
    assert plan.sampler.cfg_layout is not CfgLayout.NONE
