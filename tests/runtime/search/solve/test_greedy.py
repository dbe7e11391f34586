"""The greedy search is the paper's Algorithm 1."""

from __future__ import annotations

import pytest
import torch

from ditfastattn import CfgLayout, Strategy
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.runtime.search.solve.greedy import GreedyCalibrator, Progress, relative_error
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    capture_sites,
    flat_inputs,
    largest_difference,
)

STEPS = 4
PRINTED_ORDER = (  # of Algorithm 1
    Strategy.SHARE_STEP,
    Strategy.WINDOW_SHARE_CFG,
    Strategy.WINDOW,
    Strategy.SHARE_CFG,
)


def search(
    name: str, threshold: float, layout: CfgLayout
) -> tuple[GreedyCalibrator, TinyModel, tuple[Site, ...], list[torch.Tensor]]:
    tiny = TINY_MODELS[name]()
    captured, sites = capture_sites(tiny)
    calibrator = GreedyCalibrator(captured, sites, layout, threshold, steps=STEPS)
    outputs = [calibrator.step(flat_inputs(tiny, step))[0] for step in range(STEPS)]
    return calibrator, tiny, sites, outputs


def algorithm_1(
    tiny: TinyModel, sites: tuple[Site, ...], threshold: float, layout: CfgLayout
) -> list[tuple[Strategy, ...]]:
    """Search as the paper writes it: a whole new generation for every candidate."""
    full: tuple[Strategy, ...] = (Strategy.FULL,) * len(sites)
    rows: list[tuple[Strategy, ...]] = [full]
    for step in range(1, STEPS):
        row: list[Strategy] = list(full)
        reference = tiny.reference([*rows, full], sites, layout)[step]
        for index, site in enumerate(sites):
            allowed = (index + 1) / len(sites) * threshold
            for strategy in PRINTED_ORDER:
                if why_not(strategy, site, layout):
                    continue
                trial = tuple([*row[:index], strategy, *row[index + 1 :]])
                output = tiny.reference([*rows, trial], sites, layout)[step]
                if relative_error(reference, output) < allowed:
                    row[index] = strategy
                    break
        rows.append(tuple(row))
    return rows


@pytest.mark.parametrize(
    ("name", "threshold", "layout"),
    [
        ("dit", 0.2, CfgLayout.COND_FIRST),
        ("dit", 0.15, CfgLayout.UNCOND_FIRST),
        ("pixart", 0.05, CfgLayout.UNCOND_FIRST),
        ("sd3", 0.05, CfgLayout.COND_FIRST),
    ],
)
def test_search_equals_algorithm_1_run_naively(
    name: str, threshold: float, layout: CfgLayout
) -> None:
    calibrator, tiny, sites, outputs = search(name, threshold, layout)
    assert calibrator.strategies == algorithm_1(tiny, sites, threshold, layout)
    chosen = {strategy for row in calibrator.strategies[1:] for strategy in row}
    assert len(chosen) > 1, "the threshold does not distinguish candidates: the test is idle"
    followed = tiny.reference(calibrator.strategies, sites, layout)
    assert largest_difference(outputs, followed) < 1e-5


def test_threshold_zero_chooses_full_everywhere() -> None:
    calibrator, _, _, _ = search("dit", 1e-9, CfgLayout.COND_FIRST)
    assert {s for row in calibrator.strategies for s in row} == {Strategy.FULL}


def test_a_huge_threshold_takes_the_first_candidate() -> None:
    calibrator, _, _, _ = search("dit", 100.0, CfgLayout.COND_FIRST)
    assert {s for row in calibrator.strategies[1:] for s in row} == {Strategy.SHARE_STEP}


def test_without_guidance_halves_nothing_is_shared_across_them() -> None:
    calibrator, _, _, _ = search("dit", 0.2, CfgLayout.NONE)
    assert not any(strategy.shares_guidance for row in calibrator.strategies for strategy in row)


def test_search_is_reproducible_bit_for_bit() -> None:
    first = search("dit", 0.2, CfgLayout.COND_FIRST)
    second = search("dit", 0.2, CfgLayout.COND_FIRST)
    assert first[0].strategies == second[0].strategies
    pairs = zip(first[3], second[3], strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_progress_bounds_the_cost_before_the_search() -> None:
    tiny = TINY_MODELS["dit"]()
    captured, sites = capture_sites(tiny)
    seen: list[Progress] = []
    calibrator = GreedyCalibrator(
        captured, sites, CfgLayout.COND_FIRST, 1e-9, steps=STEPS, on_progress=seen.append
    )
    for step in range(STEPS):
        calibrator.step(flat_inputs(tiny, step))
    assert seen[0].step == 0
    assert seen[0].done <= 1.01
    assert seen[0].at_most == pytest.approx(seen[-1].at_most)
    assert calibrator.forwards <= seen[0].at_most
    assert calibrator.forwards > 0.8 * seen[0].at_most  # everything was refused: the bound is near


def test_relative_error_is_the_papers() -> None:
    reference, candidate = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    assert relative_error(reference, candidate) == pytest.approx((0.0 + 0.5 + 1.0) / 3, abs=1e-4)
    assert relative_error(torch.tensor([1.0]), torch.tensor([-1.0])) == pytest.approx(2.0, abs=1e-4)
