"""A model may view what attention returns; a strategy may lay it out otherwise in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from ditfastattn import CfgLayout, Strategy
from ditfastattn.passes.plan.strategies import strategies
from tests.helpers import (
    TIMESTEPS,
    TinyModel,
    capture_every_site,
    largest_difference,
    make_plan,
    noise,
    run_plan,
    uniform_strategies,
)


class Viewing(nn.Module):
    """Scale an attention by the timestep, so that it is a site's exit, and view the result."""

    def __init__(self, merge: Callable[..., Tensor]) -> None:
        super().__init__()
        self.merge = merge
        self.query = nn.Parameter(noise(1, 16, 16) / 4)
        self.out = nn.Parameter(noise(2, 16, 16) / 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        batch, tokens, width = hidden_states.shape
        query = linear(hidden_states, self.query).view(batch, tokens, 2, -1).transpose(1, 2)
        attended = scaled_dot_product_attention(query, query, query)
        scaled = attended * timestep.float().mean() / 1000
        merged = self.merge(scaled.transpose(1, 2), (batch, tokens, width))
        return (hidden_states + linear(merged, self.out),)


@pytest.mark.parametrize("strategy", strategies(), ids=str)
def test_views_of_an_attention_follow_its_layout(strategy: Strategy) -> None:
    def call(step: int, batch: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(step, 1, 16, 16).repeat(batch, 1, 1),
            "timestep": torch.full((batch,), int(TIMESTEPS[step])),
        }

    tiny = TinyModel(Viewing(Tensor.view).eval(), call)
    twin = TinyModel(Viewing(Tensor.reshape).eval(), call)  # which the interpreter can run
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, strategy)
    found = run_plan(tiny, make_plan(tiny, rows, feed_forwards=True))
    expected = twin.reference(rows, sites, CfgLayout.COND_FIRST)
    assert largest_difference(found, expected) < 1e-5
