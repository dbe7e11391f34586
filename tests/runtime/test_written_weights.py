"""Weights may be written between generations, in any way: what runs is what the model holds now."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ditfastattn import CfgLayout, ConfigError, Plan, Strategy
from ditfastattn.passes.analysis.fingerprint import module_fingerprint
from ditfastattn.passes.analysis.output_site import OUTPUT
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.plan.planned_site import PlannedSite
from ditfastattn.runtime import opaque
from ditfastattn.runtime.opaque import OpaqueModel
from ditfastattn.runtime.options import parse_options
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    largest_difference,
    make_plan,
    mixed_strategies,
    tiny_dit,
    uniform_strategies,
)
from tests.works_with import works_with

OTHER = r"plan\.model\.weights[\s\S]*remedy: .*give it the plan's weights again"
CALIBRATES = "this first generation calibrates"
UNSAMPLED = "in elements that a plan's fingerprint does not cover"


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


def write(model: nn.Module, writing: Callable[[nn.Parameter], None] = in_data) -> None:
    for parameter in model.parameters():
        writing(parameter)


def stored(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.data.clone() for parameter in model.parameters()]


def write_back(model: nn.Module, weights: list[torch.Tensor]) -> None:
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.data.copy_(weight)


@works_with(
    "Weights",
    'written between generations, as EMA does, with `check_weights="never"`',
    "works",
    "the next generation is of the weights that the model then holds",
)
@pytest.mark.parametrize("writing", [in_data, in_place, as_other_data])
@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_written_weights_count_from_the_next_generation_on(
    name: str, writing: Callable[[nn.Parameter], None]
) -> None:
    tiny = copied(TINY_MODELS[name]())
    model = planned(tiny, plan=full_plan(tiny), check_weights="never")
    before = tiny.run(model)
    write(tiny.model, writing)
    after = tiny.run(model)
    assert largest_difference(before, after) > 1e-3
    assert largest_difference(after, tiny.run(tiny.model)) == 0.0


@works_with(
    "Weights",
    "written between generations",
    "refused",
    "until the plan's own weights are back",
)
@pytest.mark.parametrize("check", ["sampled", "full"])
def test_a_plan_of_other_weights_is_refused_until_its_own_are_back(check: str) -> None:
    tiny = copied(tiny_dit())
    _, sites = capture_every_site(tiny)
    plan = make_plan(tiny, mixed_strategies(sites, seed=2), feed_forwards=True)
    model = planned(tiny, plan=plan, check_weights=check)
    expected = tiny.run(model)
    weights = stored(tiny.model)
    write(tiny.model)
    for _ in range(2):
        with pytest.raises(ConfigError, match=OTHER):
            tiny.run(model)
    write_back(tiny.model, weights)
    assert largest_difference(tiny.run(model), expected) == 0.0


def test_the_option_takes_three_values() -> None:
    with pytest.raises(ConfigError, match=r"check_weights[\s\S]*expected: +sampled, full, never"):
        parse_options({"check_weights": "sometimes"}, None)


@pytest.mark.parametrize(("check", "seen"), [("sampled", False), ("full", True)])
def test_a_full_check_sees_every_element(
    check: str, seen: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = copied(tiny_dit(head_dim=24, layers=1))
    model = planned(tiny, plan=full_plan(tiny), check_weights=check)
    tiny.run(model)
    weights: Any = tiny.model.get_parameter("transformer_blocks.0.ff.net.0.proj.weight")
    assert weights.numel() >= 2 * 4096
    weights.data.view(-1)[1] += 1.0
    assert largest_difference(tiny.run(model), tiny.run(tiny.model)) == 0.0
    assert (UNSAMPLED in caplog.text) is seen
    caplog.clear()
    tiny.run(model)
    assert UNSAMPLED not in caplog.text


def test_a_self_calibration_is_repeated_for_other_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny = copied(tiny_dit(layers=1))
    model = planned(tiny, threshold=0.2, cfg_layout=CfgLayout.COND_FIRST)
    first, expected = tiny.run(model), tiny.run(model)
    assert caplog.text.count(CALIBRATES) == 1
    weights = stored(tiny.model)
    write(tiny.model)
    calibrating = tiny.run(model)
    assert caplog.text.count(CALIBRATES) == 2
    assert largest_difference(calibrating, first) > 1e-3
    tiny.run(model)
    write_back(tiny.model, weights)
    assert largest_difference(tiny.run(model), expected) == 0.0
    assert caplog.text.count(CALIBRATES) == 2


def test_a_model_that_is_called_as_it_is_has_its_weights_checked_too() -> None:
    tiny = copied(tiny_dit(layers=1))
    plan = opaque_plan(tiny)
    model = OpaqueModel(tiny.model, plan)
    expected = run_opaque(model, tiny)
    weights = stored(tiny.model)
    write(tiny.model)
    with pytest.raises(ConfigError, match=OTHER):
        run_opaque(model, tiny)
    write_back(tiny.model, weights)
    assert largest_difference(run_opaque(model, tiny), expected) == 0.0


def test_weights_that_come_back_from_offloading_are_compared_with_the_plans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = copied(tiny_dit(layers=1))
    plan = opaque_plan(tiny)
    weights = stored(tiny.model)
    with monkeypatch.context() as offloaded:
        offloaded.setattr(opaque, "is_offloaded", lambda module: True)
        model = OpaqueModel(tiny.model, plan)
        expected = run_opaque(model, tiny)  # nothing to compare
    write(tiny.model)
    with pytest.raises(ConfigError, match=OTHER):
        run_opaque(model, tiny)
    write_back(tiny.model, weights)
    assert largest_difference(run_opaque(model, tiny), expected) == 0.0


def opaque_plan(tiny: TinyModel) -> Plan:
    full = full_plan(tiny)
    latent = tiny.call(0, 4)["hidden_states"]
    site = PlannedSite(
        name=OUTPUT,
        kind=SiteKind.OUTPUT,
        tokens=latent[0, 0].numel(),
        heads=1,
        head_dim=latent.shape[1],
        window=0,
        latent="hidden_states",
    )
    share = [Strategy.SHARE_STEP if step % 2 else Strategy.FULL for step in range(6)]
    return full.model_copy(
        update={
            "model": module_fingerprint(tiny.model),
            "inputs": {"hidden_states": tuple(latent.shape[1:])},
            "sites": (site,),
            "strategies": tuple((strategy,) for strategy in share),
        }
    )


def run_opaque(model: OpaqueModel, tiny: TinyModel) -> list[torch.Tensor]:
    return tiny.run(lambda **call: model(tiny.model.forward, (), call))
