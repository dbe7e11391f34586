"""A caller may write to the outputs of a model that returns what is also cached or hoisted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, scaled_dot_product_attention

from ditfastattn import CfgLayout, Strategy
from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.runtime.reference import PlanInterpreter
from tests.helpers import (
    TIMESTEPS,
    TinyModel,
    capture_every_site,
    largest_difference,
    make_plan,
    noise,
    uniform_strategies,
)

View = Callable[[Tensor], Tensor]


class Returning(nn.Module):
    """Return the denoised latent, and a view of the attention's projection as well."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.query = nn.Parameter(noise(1, 8, 8) / 4)
        self.out = nn.Parameter(noise(2, 8, 8) / 4)
        self.view = view

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        query = linear(hidden_states, self.query)
        attended = scaled_dot_product_attention(query, query, hidden_states)
        projected = linear(attended, self.out)
        return hidden_states + projected * timestep.float().mean() / 1000, self.view(projected)


VIEWS: dict[str, View] = {
    "itself": lambda x: x,
    "a slice": lambda x: x[..., :4],
    "a chunk": lambda x: x.chunk(2, dim=-1)[1],
    "a reshape": lambda x: x.reshape(x.shape[0], -1),
    "a diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
    "an einsum": lambda x: torch.einsum("bhnd->bnhd", x),
    "an unfolding": lambda x: x.unfold(2, 4, 4),
    "a dropout": lambda x: dropout(x, 0.5, training=False),
}


def returning(view: View) -> TinyModel:
    def call(step: int, batch: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(step, 1, 1, 16, 8).repeat(batch, 1, 1, 1),
            "timestep": torch.full((batch,), int(TIMESTEPS[step])),
        }

    return TinyModel(Returning(view).eval(), call)


def planned(tiny: TinyModel, strategy: Strategy) -> Any:
    _, sites = capture_every_site(tiny)
    plan = make_plan(tiny, uniform_strategies(sites, strategy), feed_forwards=True)
    torch._dynamo.reset()
    options: dict[str, Any] = {"plan": plan, "lowering": "eager"}
    return torch.compile(tiny.model, backend="ditfastattn", fullgraph=True, options=options)


def written_over(tiny: TinyModel, model: Any) -> list[Tensor]:
    """Run ``model``, and write to its outputs at each step once they have been copied."""
    copies: list[Tensor] = []
    for step in range(len(TIMESTEPS)):
        with torch.no_grad():
            outputs = model(**tiny.call(step, 4))
        copies += [output.clone() for output in outputs]
        for output in outputs:
            output.fill_(1e3)
    return copies


def interpreted(tiny: TinyModel, strategy: Strategy) -> list[Tensor]:
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, strategy)
    interpreter = PlanInterpreter(tiny.model, rows, sites, CfgLayout.COND_FIRST)
    results: list[Tensor] = []
    for step in range(len(TIMESTEPS)):
        with torch.no_grad(), interpreter.step(step):
            results += tiny.model(**tiny.call(step, 4))
    return results


@pytest.mark.parametrize("view", list(VIEWS))
def test_a_returned_projection_may_be_written_to(view: str) -> None:
    tiny = returning(VIEWS[view])
    found = written_over(tiny, planned(tiny, Strategy.SHARE_STEP))
    assert largest_difference(found, interpreted(tiny, Strategy.SHARE_STEP)) < 1e-5


@pytest.mark.parametrize(
    "strategy", [s for s in strategies() if s not in (Strategy.FULL, Strategy.SHARE_STEP)]
)
def test_so_it_may_with_every_strategy(strategy: Strategy) -> None:
    tiny = returning(VIEWS["itself"])
    found = written_over(tiny, planned(tiny, strategy))
    assert largest_difference(found, interpreted(tiny, strategy)) < 1e-5


class ReturningText(Returning):
    """Return the text's projection, which is hoisted out of the steps."""

    def forward(  # type: ignore[override]  # conditions as well
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        text = linear(encoder_hidden_states, self.out)
        shift = linear(timestep.float()[:, None, None, None].expand(-1, 1, 1, 8), self.out)
        sample, _ = super().forward(hidden_states + text + shift, timestep)
        return sample, self.view(text), shift


def test_what_is_hoisted_may_be_written_to() -> None:
    text = noise(5, 4, 1, 1, 8)  # the very same at every step, as pipelines hand it over
    plain = returning(VIEWS["itself"])
    tiny = TinyModel(
        ReturningText(VIEWS["itself"]).eval(),
        lambda step, batch: {**plain.call(step, batch), "encoder_hidden_states": text},
    )
    model = planned(tiny, Strategy.FULL)
    for _ in range(2):  # what a timestep decides is kept for the next generation
        found = written_over(tiny, model)
        assert largest_difference(found, interpreted(tiny, Strategy.FULL)) < 1e-5
