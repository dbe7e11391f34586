"""Plans run with any pass switched off, and with any amount of fuel, as far as those leave them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from ditfastattn import CfgLayout, Plan, Strategy
from ditfastattn.passes.analysis.site import CacheDtype
from ditfastattn.passes.rewrites.pipeline import PASS_NAMES, switches
from tests.heads import head_plan, split
from tests.helpers import (
    TIMESTEPS,
    TinyModel,
    capture_every_site,
    largest_difference,
    make_plan,
    noise,
    run_plan,
)
from tests.runtime import test_separate_guidance as separate

F, W, S, C = Strategy.FULL, Strategy.WINDOW, Strategy.SHARE_STEP, Strategy.SHARE_CFG
B, E, Q = Strategy.WINDOW_SHARE_CFG, Strategy.EXTRAPOLATE, Strategy.EXTRAPOLATE_QUADRATIC
ROWS = [(F, F, F), (F, W, C), (C, B, S), (Q, E, F), (W, F, B), (S, Q, E)]  # by three attentions


class Attentions(nn.Module):
    """Attend three times; text and timestep enter through products that are hoisted."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(noise(seed, 8, 8) / 3 for seed in range(5))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor]:
        *projections, text, time = self.weights
        when = (timestep.float() / 1000)[:, None, None].expand(-1, 1, 8)
        x = hidden_states + linear(encoder_hidden_states, text).mean(1, keepdim=True)
        for weight in projections:
            projected = linear(x, weight)
            heads = projected.view(*projected.shape[:2], 2, 4).transpose(1, 2)
            attended = scaled_dot_product_attention(heads, heads, heads)
            x = x + linear(attended.transpose(1, 2).flatten(2), weight) * linear(when, time)
        return (x,)


def attentions() -> TinyModel:
    text = noise(9, 4, 3, 8)

    def call(step: int, batch: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(step, 1, 16, 8).repeat(batch, 1, 1),
            "timestep": torch.full((batch,), int(TIMESTEPS[step])),
            "encoder_hidden_states": text[:batch],
        }

    return TinyModel(Attentions().eval(), call)


def with_half_caches(plan: Plan) -> Plan:
    half = {"cache_dtype": CacheDtype.FLOAT16}
    sites = tuple(site.model_copy(update=half) for site in plan.sites)
    return plan.model_copy(update={"sites": sites})


def check(found: list[Tensor], expected: list[Tensor], rounded: bool) -> None:
    difference = largest_difference(found, expected)
    assert 1e-5 < difference < 2e-2 if rounded else difference < 1e-5


@pytest.mark.parametrize("name", ["", *PASS_NAMES])
def test_any_pass_can_be_switched_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITFASTATTN_DISABLE", name)
    tiny = attentions()
    _, sites = capture_every_site(tiny)
    plan = with_half_caches(make_plan(tiny, ROWS))
    left = switches().plan(ROWS, two_calls=False)
    expected = tiny.reference(left, sites, CfgLayout.COND_FIRST)
    reads = any(strategy.windowed or not strategy.computes for row in left for strategy in row)
    check(run_plan(tiny, plan), expected, rounded=reads and name != "narrow-caches")


@pytest.mark.parametrize("name", ["store-caches", "reuse-outputs", "share-guidance"])
def test_any_pass_can_be_switched_off_between_two_calls(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITFASTATTN_DISABLE", name)
    tiny = attentions()
    left = switches().plan(ROWS, two_calls=True)
    model = separate.compiled(tiny, separate.plan_of(tiny, ROWS))
    check(separate.run(tiny, model), separate.reference(tiny, left), rounded=False)


@pytest.mark.parametrize("name", ["store-caches", "reuse-outputs", "merge-heads"])
def test_any_pass_can_be_switched_off_where_heads_are_split(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITFASTATTN_DISABLE", name)
    tiny = attentions()
    sites = split(tiny, 2).every
    rows = [tuple(row[index // 2] for index in range(6)) for row in ROWS]
    rows[4] = (S, *rows[4][1:])  # beside a group that does something else
    left = switches().plan(rows, two_calls=False)
    expected = tiny.reference(left, sites, CfgLayout.COND_FIRST)
    check(run_plan(tiny, head_plan(tiny, 2, rows)), expected, rounded=False)


def fuelled(row: tuple[Strategy, ...], fuel: int) -> tuple[Strategy, ...]:
    shortcuts = [index for index, strategy in enumerate(row) if strategy != F]
    return tuple(F if index in shortcuts[fuel:] else s for index, s in enumerate(row))


@pytest.mark.parametrize("fuel", [0, 1, 2])
@pytest.mark.parametrize("calls", [1, 2])
def test_any_amount_of_fuel_will_do(calls: int, fuel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITFASTATTN_FUEL", str(fuel))
    tiny = attentions()
    if calls == 1:
        found, dense = run_plan(tiny, make_plan(tiny, ROWS)), tiny.run(tiny.model)
    else:
        model = separate.compiled(tiny, separate.plan_of(tiny, ROWS))
        found, dense = separate.run(tiny, model), separate.run(tiny, tiny.model)
    differs = largest_difference(found, dense) > 1e-5
    assert differs == (fuel > 0)
