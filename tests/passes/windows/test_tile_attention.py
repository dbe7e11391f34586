"""Windows by tiles: the operator, the form that skips other tiles, and plans that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ditfastattn import CfgLayout, ConfigError, Plan, Strategy
from ditfastattn.passes.analysis.flops import count_flops
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.ir import ATTENTION, aten, calls, value
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.windows.forms import band, fraction, sequence_tiles, tiles
from ditfastattn.passes.windows.lower_tile_attention import lower_tile_attention
from ditfastattn.passes.windows.lower_windows import compute_window
from ditfastattn.passes.windows.tile_attention import (
    TILE_ATTENTION,
    near_tiles,
    seen_pairs,
    tile_pairs,
)
from ditfastattn.passes.windows.window import TileWindow
from ditfastattn.passes.windows.window_attention import seen_pairs as band_pairs
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    largest_difference,
    make_plan,
    mixed_strategies,
    run_plan,
    uniform_strategies,
)
from tests.passes.windows.test_window_attention import compiled, inputs, trace
from tests.tiers import slow_but

IMAGE = TileWindow(grid=(8, 12), tile=(2, 3), reach=(1, 1))
VIDEO = TileWindow(grid=(3, 8, 6), tile=(3, 2, 1), reach=(0, 1, 2))
WINDOWS = {"image": IMAGE, "video": VIDEO, "a row": TileWindow(grid=(16,), tile=(2,), reach=(1,))}


def tiled(window: TileWindow, *text: int) -> Callable[..., Tensor]:
    sizes = [list(part) for part in (window.grid, window.tile, window.reach)]
    return lambda q, k, v: TILE_ATTENTION(q, k, v, *sizes, 0.3, *text)


def pairs_by_hand(window: TileWindow, before: int, after: int) -> Tensor:
    """Go through every pair of tokens, and every axis."""
    places = [None] * before + list(product(*map(range, window.grid))) + [None] * after
    seen = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            seen[i, j] = query is None or key is None or is_near(window, query, key)
    return seen


def is_near(window: TileWindow, query: Sequence[int], key: Sequence[int]) -> bool:
    for axis, count in enumerate(window.counts):
        own, other = query[axis] // window.tile[axis], key[axis] // window.tile[axis]
        span = min(count, 2 * window.reach[axis] + 1)
        first = max(0, min(own - window.reach[axis], count - span))
        if not first <= other < first + span:
            return False
    return True


@pytest.mark.parametrize("text", [(0, 0), (2, 0), (1, 3)])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_seen_pairs_are_those_of_near_tiles(window: TileWindow, text: tuple[int, int]) -> None:
    seen = seen_pairs(window, *text)
    assert torch.equal(seen, pairs_by_hand(window, *text))
    assert int(seen.sum()) == tile_pairs(window, len(seen), len(seen))


def test_every_tile_sees_equally_many_at_the_edges_too() -> None:
    near = near_tiles(IMAGE)
    assert near.shape == (16, 9)
    assert near[0].tolist() == [
        0,
        1,
        2,
        4,
        5,
        6,
        8,
        9,
        10,
    ]  # the corner sees what its neighbour does
    assert all(len(set(row)) == 9 for row in near.tolist())


@pytest.mark.parametrize("text", [(0, 0), (5, 0), (0, 5), (3, 4)])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_the_form_equals_the_op(window: TileWindow, text: tuple[int, int]) -> None:
    examples = inputs(2, 3, window.tokens + sum(text), 16)
    module = trace(tiled(window, *text), *examples)
    (node,) = calls(module.graph, TILE_ATTENTION)
    before, node.meta["stack_trace"] = value(node), "File model.py, line 7"
    assert lower_tile_attention(module) == []
    assert not calls(module.graph, TILE_ATTENTION)
    (after,) = module.graph.output_node().all_input_nodes
    assert (value(after).shape, value(after).stride()) == (before.shape, before.stride())
    assert calls(module.graph, ATTENTION)[0].meta["stack_trace"] == "File model.py, line 7"
    expected = tiled(window, *text)(*examples)
    torch.testing.assert_close(module(*examples)[0], expected, rtol=0, atol=1e-5)
    q, k, v = examples
    eager = compute_window(q, k, v, window, 0.3, text)
    torch.testing.assert_close(eager, expected, rtol=0, atol=1e-5)


def test_the_compiled_form_equals_the_op() -> None:
    examples = inputs(2, 3, IMAGE.tokens + 5, 16)
    module = trace(tiled(IMAGE, 0, 5), *examples)
    lower_tile_attention(module)
    expected = tiled(IMAGE, 0, 5)(*examples)
    torch.testing.assert_close(compiled(module, *examples), expected, rtol=0, atol=1e-5)


def test_the_form_skips_the_other_tiles() -> None:
    window = TileWindow(grid=(32, 32), tile=(4, 4), reach=(1, 1))
    module = trace(tiled(window), *inputs(1, 2, 1024, 16))
    counted = count_flops(module.graph).attention
    lower_tile_attention(module)
    (attention,) = calls(module.graph, ATTENTION)
    assert value(attention.args[0]).shape == (2, 64, 16, 16)
    assert value(attention.args[1]).shape == (2, 64, 9 * 16, 16)
    assert count_flops(module.graph).attention == counted == 4 * 2 * 16 * 1024 * 9 * 16


def test_tiles_of_the_sequence_attend_slices() -> None:
    window = TileWindow(grid=(1024,), tile=(64,), reach=(2,))
    module = trace(tiled(window), *inputs(1, 2, 1024, 16))
    counted = count_flops(module.graph).attention
    lower_tile_attention(module)
    attentions = calls(module.graph, ATTENTION)
    shapes = [tuple(value(node.args[i]).shape[2] for i in (0, 1)) for node in attentions]
    assert shapes == [(192, 320), *[(64, 320)] * 10, (192, 320)]  # tiles at an end see the same
    assert count_flops(module.graph).attention == counted == 4 * 2 * 16 * 1024 * 320
    assert not calls(module.graph, aten.index_select.default)


@pytest.mark.parametrize(("tokens", "tile", "reach"), [(4096, 256, 2), (1024, 64, 2), (600, 40, 2)])
def test_tiles_of_the_sequence_see_the_papers_window(tokens: int, tile: int, reach: int) -> None:
    window = sequence_tiles(tokens)
    assert window is not None
    assert window == TileWindow(grid=(tokens,), tile=(tile,), reach=(reach,))
    seen, of_band = seen_pairs(window, 0, 0), band_pairs(tokens, band(tokens), 0, 0)
    assert bool((seen | ~of_band).all())
    assert int(seen.sum()) < 0.4 * tokens**2


def test_a_sequence_that_nothing_divides_has_no_tiles() -> None:
    assert sequence_tiles(1021) is None


def test_what_would_fill_the_memory_stays_and_is_named() -> None:
    window = TileWindow(grid=(64, 64, 64), tile=(8, 8, 8), reach=(1, 1, 1))
    fake = [torch.empty(1, 2, 64**3, 64, device="meta") for _ in range(3)]
    module = trace(tiled(window), *fake)
    (reason,) = lower_tile_attention(module)
    assert "would take 6912 MiB" in reason
    assert len(calls(module.graph, TILE_ATTENTION)) == 1


def test_bad_windows_are_refused() -> None:
    with pytest.raises(ValidationError, match="3 does not divide 8 tokens"):
        TileWindow(grid=(8, 8), tile=(3, 2), reach=(1, 1))
    with pytest.raises(ValidationError, match="one number each per axis"):
        TileWindow(grid=(8, 8), tile=(2, 2), reach=(1,))
    with pytest.raises(ConfigError, match="wrong number of tokens"):
        tiled(IMAGE)(*inputs(1, 2, 95, 16))


@pytest.mark.parametrize(
    ("grid", "counts"),
    [
        ((64, 64), (8, 8)),
        ((32, 32), (8, 8)),
        ((13, 30, 45), (13, 6, 5)),  # a video of 13 frames
        ((5, 30, 45), (5, 6, 5)),
        ((2, 8), (1, 8)),  # two frames are seen whole
        ((16, 12), (8, 6)),
    ],
)
def test_tiles_are_about_a_sixth_of_an_axis(grid: tuple[int, ...], counts: tuple[int, ...]) -> None:
    window = tiles(grid)
    assert window is not None
    assert window.counts == counts
    assert window.spans == tuple(min(count, 3) for count in counts)


def test_a_grid_without_tiles_has_none() -> None:
    assert tiles(()) is None
    assert tiles((3, 2)) is None


def test_fractions_tell_windows_apart() -> None:
    window = tiles((64, 64))
    assert window is not None
    assert fraction(window, 4096) == pytest.approx(9 / 64)
    assert fraction(band(4096), 4096) == pytest.approx(15 / 64, abs=1e-3)
    assert str(window) == "3x3 of 8x8 tiles"


# Plans.


def by_tiles(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Give each site that has a window its window by tiles."""
    chosen = []
    for site in sites:
        forms = [form for form in site.windows if isinstance(form, TileWindow)]
        chosen.append(replace(site, window=forms[0]) if forms else site)
    return tuple(chosen)


def plan_of(
    tiny: TinyModel,
    rows: Sequence[Sequence[Strategy]],
    sites: Sequence[Site],
    layout: CfgLayout = CfgLayout.COND_FIRST,
) -> Plan:
    plan = make_plan(tiny, rows, layout, feed_forwards=True)
    return plan.model_copy(update={"sites": tuple(planned_site(site) for site in sites)})


@pytest.mark.parametrize(
    "layout",
    slow_but({CfgLayout.COND_FIRST}, [CfgLayout.COND_FIRST, CfgLayout.UNCOND_FIRST]),
)
@pytest.mark.parametrize("strategy", [Strategy.WINDOW, Strategy.WINDOW_SHARE_CFG, None])
@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_plans_of_tiles_equal_the_interpreter(
    name: str, strategy: Strategy | None, layout: CfgLayout
) -> None:
    tiny = TINY_MODELS[name]()
    _, found = capture_every_site(tiny)
    sites = by_tiles(found)
    windows = {site.window for site in sites if site.window}
    assert windows == {TileWindow(grid=(4, 4), tile=(1, 1), reach=(1, 1))}
    rows = uniform_strategies(sites, strategy) if strategy else mixed_strategies(sites, seed=1)
    expected = tiny.reference(rows, sites, layout)
    plan = Plan.parse(plan_of(tiny, rows, sites, layout).model_dump_json())
    assert largest_difference(run_plan(tiny, plan), expected) < 1e-5
    bands = tiny.reference(rows, found, layout)
    assert largest_difference(expected, bands) > 1e-4  # the other window computes something else


def test_a_plan_takes_its_own_window() -> None:
    tiny = TINY_MODELS["dit"]()
    _, found = capture_every_site(tiny)
    sites = tuple(replace(site, window=4) if site.window else site for site in found)
    rows = uniform_strategies(sites, Strategy.WINDOW)
    got = run_plan(tiny, plan_of(tiny, rows, sites))
    assert largest_difference(got, tiny.reference(rows, sites, CfgLayout.COND_FIRST)) < 1e-5


def test_a_grid_of_other_tokens_is_refused() -> None:
    tiny = TINY_MODELS["dit"]()
    _, found = capture_every_site(tiny)
    other = TileWindow(grid=(8, 8), tile=(2, 2), reach=(1, 1))
    sites = tuple(replace(site, window=other) if site.window else site for site in found)
    plan = plan_of(tiny, uniform_strategies(sites, Strategy.WINDOW), sites)
    with pytest.raises(ConfigError, match=r"16 tokens of the image(.|\n)*8 x 8"):
        run_plan(tiny, plan)
