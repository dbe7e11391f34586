"""What torch.export makes of a model: the same sites, and the same plans, as Dynamo's door."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ditfastattn import CfgLayout, ConfigError, Strategy
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.capture.exported import capture_exported
from ditfastattn.passes.plan.actions import SiteAction
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.rewrites.pipeline import rewrite
from ditfastattn.runtime.exported import PlannedProgram
from tests.helpers import (
    STEPS,
    TINY_MODELS,
    TinyModel,
    captured_once,
    flat_inputs,
    largest_difference,
    make_plan,
    mixed_strategies,
    noise,
    tiny_dit,
)
from tests.runtime.test_traced import SHARED, Denoiser, plan_for


def export_anew(tiny: TinyModel) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(tiny.model, (), tiny.call(0, 4))


exported = functools.cache(export_anew)  # nobody changes a program but who exports it anew


@pytest.mark.parametrize("name", TINY_MODELS)
def test_both_doors_find_the_same_sites_and_inputs(name: str) -> None:
    tiny = TINY_MODELS[name]()
    captured, known = capture_exported(exported(tiny)), captured_once(tiny)
    found = find_sites(captured).sites
    assert [
        (planned_site(s), s.ordinal, s.text, s.no_window, s.no_shared_guidance) for s in found
    ] == [
        (planned_site(s), s.ordinal, s.text, s.no_window, s.no_shared_guidance) for s in known.every
    ]
    assert {(entry.name, entry.static) for entry in captured.inputs} == {
        (entry.name, entry.static) for entry in known.graph.inputs
    }


@pytest.mark.parametrize("layout", [CfgLayout.COND_FIRST, CfgLayout.UNCOND_FIRST])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_plan_of_the_other_door_is_the_interpreters(name: str, layout: CfgLayout) -> None:
    tiny = TINY_MODELS[name]()
    every = captured_once(tiny).every
    rows = mixed_strategies(every, seed=2)
    plan = make_plan(tiny, rows, layout, feed_forwards=True)  # by Dynamo's door
    planned = PlannedProgram(exported(tiny), plan, lowering="eager")
    expected = tiny.reference(rows, every, layout)
    assert largest_difference(tiny.run(planned), expected) < 1e-5
    assert largest_difference(tiny.run(planned), expected) < 1e-5  # and a second generation
    assert largest_difference(tiny.run(tiny.model), expected) > 1e-3


def test_compiled_it_is_the_interpreters_too(tmp_path: Path) -> None:
    tiny = tiny_dit()
    every = captured_once(tiny).every
    rows = mixed_strategies(every, seed=3)
    make_plan(tiny, rows, feed_forwards=True).save(tmp_path / "plan.json")
    planned = PlannedProgram(exported(tiny), tmp_path / "plan.json")
    expected = tiny.reference(rows, every, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(planned), expected) < 1e-5


def test_the_passes_rewrite_an_exported_graph() -> None:
    tiny = tiny_dit()
    captured = capture_exported(exported(tiny))
    sites = find_sites(captured).sites
    full = [SiteAction(Strategy.FULL)] * len(sites)
    module = rewrite(captured, sites, full, CfgLayout.COND_FIRST)
    by_name = dict(
        zip([e.name for e in captured_once(tiny).graph.inputs], flat_inputs(tiny, 1), strict=True)
    )
    with torch.no_grad():
        got = module(*(by_name[entry.name] for entry in captured.inputs))[0]
        assert torch.equal(got, tiny.model(**tiny.call(1, 4))[0])


def assert_interprets(program: ExportedProgram, tiny: TinyModel) -> None:
    """By a mixed plan ``program`` must compute what the plan interpreter does."""
    every = captured_once(tiny).every
    rows = mixed_strategies(every, seed=2)
    plan = make_plan(tiny, rows, feed_forwards=True)
    planned = PlannedProgram(program, plan, lowering="eager")
    expected = tiny.reference(rows, every, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(planned), expected) < 1e-5


def test_a_program_of_free_batch_is_captured_at_its_examples_shapes() -> None:
    tiny = tiny_dit()
    given = tiny.call(0, 4)
    batch = Dim("batch", min=2, max=16)
    shapes = {
        name: {0: batch} if isinstance(item, Tensor) else None for name, item in given.items()
    }
    with torch.no_grad():
        program = torch.export.export(tiny.model, (), given, dynamic_shapes=shapes)
    assert_interprets(program, tiny)


def test_a_saved_program_runs_by_a_plan(tmp_path: Path) -> None:
    tiny = tiny_dit()
    torch.export.save(exported(tiny), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert_interprets(program, tiny)


def test_other_arguments_than_the_exports_are_refused() -> None:
    tiny = tiny_dit()
    program = exported(tiny)
    sites = captured_once(tiny).sites
    plan = make_plan(tiny, [(Strategy.FULL,) * len(sites)] * STEPS)
    planned = PlannedProgram(program, plan, lowering="eager")
    given = tiny.call(0, 4)
    with torch.no_grad():
        with pytest.raises(ConfigError, match=r"hidden_states[\s\S]*got: +\[2, 4, 8, 8\]"):
            planned(**tiny.call(0, 2))
        with pytest.raises(ConfigError, match=r"not a tensor is a constant[\s\S]*got: +True"):
            planned(**{**given, "return_dict": True})
        with pytest.raises(ConfigError, match="structure of the export"):
            planned(**{**given, "more": 1})
    with pytest.raises(ConfigError, match="unknown option"):
        PlannedProgram(program, plan, speed=2)


class Counting(nn.Module):
    """A model that writes to a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return hidden_states + self.calls


def test_effects_beside_the_results_are_refused() -> None:
    program = torch.export.export(Counting(), (), {"hidden_states": torch.ones(2, 3)})
    with pytest.raises(ConfigError, match="writes in place"):
        capture_exported(program)
    with pytest.raises(ConfigError, match=r"got: +buffer_mutation calls"):
        capture_exported(program.run_decompositions({}))


def test_a_program_without_example_inputs_is_refused() -> None:
    program: Any = export_anew(tiny_dit())
    program.example_inputs = None
    with pytest.raises(ConfigError, match="no example inputs"):
        capture_exported(program)


class TwoTimes(Denoiser):
    def forward(
        self, latent: Tensor, timestep: Tensor, timestep_r: Tensor, unused: Tensor
    ) -> tuple[Tensor]:
        return (self.run(self.embed(latent), timestep + timestep_r),)


def test_a_plan_runs_a_program_that_takes_a_tensor_twice_and_what_is_unused() -> None:
    time = torch.full((2,), 900.0)
    latent, unused = noise(0, 2, 16, 4), noise(1, 2, 5)
    call = {"latent": latent, "timestep": time, "timestep_r": time, "unused": unused}
    model = TwoTimes().eval()
    plan = plan_for(model, call, *SHARED)
    assert set(plan.inputs) == {"latent", "timestep"}  # what Dynamo takes
    program = torch.export.export(model, (), call)
    with torch.no_grad():
        found = PlannedProgram(program, plan, lowering="eager")(**call)[0]
        torch.testing.assert_close(found, model(**call)[0])
    other = plan.model_copy(update={"inputs": {"latent": (16, 4), "timestep": (7,)}})
    with pytest.raises(ConfigError, match=r"inputs\.timestep[\s\S]*\(\)[\s\S]*\(7,\)"):
        PlannedProgram(program, other, lowering="eager")(**call)
