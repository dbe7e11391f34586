"""Weights may be written between generations, in any way: what runs is what the model holds now."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ditfastattn import Plan, Strategy
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    largest_difference,
    make_plan,
    uniform_strategies,
)

OTHER = r"plan\.model\.weights"


def copied(tiny: TinyModel) -> TinyModel:
    """Return a copy whose weights a test may write; it is called with the same conditions."""
    first = tiny.call(0, 4)

    def call(step: int, batch: int) -> dict[str, Any]:
        own = tiny.call(step, batch)
        return {**first, "hidden_states": own["hidden_states"], "timestep": own["timestep"]}

    return TinyModel(copy.deepcopy(tiny.model), call)


def full_plan(tiny: TinyModel) -> Plan:
    _, sites = capture_every_site(tiny)
    return make_plan(tiny, uniform_strategies(sites, Strategy.FULL), feed_forwards=True)


def planned(tiny: TinyModel, **options: Any) -> Any:
    torch._dynamo.reset()
    chosen: dict[str, Any] = {"lowering": "eager", **options}
    return torch.compile(tiny.model, backend="ditfastattn", fullgraph=True, options=chosen)


def in_data(parameter: nn.Parameter) -> None:
    parameter.data.copy_(1.25 * parameter.data)  # as EMA's copy_to does; no version counts it


def in_place(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(1.25)


def as_other_data(parameter: nn.Parameter) -> None:
    parameter.data = 1.25 * parameter.data


def write(model: nn.Module, writing: Callable[[nn.Parameter], None]) -> None:
    for parameter in model.parameters():
        writing(parameter)


@pytest.mark.parametrize("writing", [in_data, in_place, as_other_data])
@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_written_weights_count_from_the_next_generation_on(
    name: str, writing: Callable[[nn.Parameter], None]
) -> None:
    tiny = copied(TINY_MODELS[name]())
    model = planned(tiny, plan=full_plan(tiny))
    before = tiny.run(model)
    write(tiny.model, writing)
    after = tiny.run(model)
    assert largest_difference(before, after) > 1e-3
    assert largest_difference(after, tiny.run(tiny.model)) == 0.0
