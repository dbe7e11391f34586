"""Rewritten graphs compute what the plan interpreter computes, for random models and plans."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ditfastattn import CfgLayout
from ditfastattn.passes.analysis.sites import Site
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import outputs
from ditfastattn.passes.graph.slots import read_slots, written_slots
from ditfastattn.passes.plan.actions import ActionRow
from ditfastattn.passes.plan.guidance import calls_of
from ditfastattn.passes.plan.step_program import StepProgram, unroll
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.rewrites.pipeline import rewrite
from ditfastattn.passes.windows.lower_window_attention import WindowKernel
from ditfastattn.passes.windows.lower_windows import lower_windows
from ditfastattn.runtime.caches import Caches
from ditfastattn.runtime.reference import PlanInterpreter
from ditfastattn.tools.zoo.trial import mixed_strategies
from tests.heads import split
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    captured_once,
    flat_inputs,
    largest_difference,
)

STEPS = 4
LAYOUTS = (
    CfgLayout.NONE,
    CfgLayout.COND_FIRST,
    CfgLayout.UNCOND_FIRST,
    CfgLayout.SEPARATE,
    CfgLayout.SEPARATE_UNCOND_FIRST,
)
PLANS = 50  # of each of ten groups
PLANS_BY_DEFAULT = 4


@dataclass(frozen=True)
class Case:
    """One random pair of a model and a plan."""

    tiny: TinyModel
    captured: CapturedGraph
    sites: tuple[Site, ...]
    layout: CfgLayout
    rows: list[tuple[Strategy, ...]]
    merge_variants: bool


def draw(seed: int, layout: CfgLayout, head_groups: int) -> Case:
    generator = random.Random(seed)
    tiny = TINY_MODELS[generator.choice(list(TINY_MODELS))](layers=1 + seed % 2)
    found = captured_once(tiny) if head_groups == 1 else split(tiny, head_groups)
    sites = tuple(
        replace(site, window=generator.choice(site.windows)) if site.windows else site
        for site in found.every
    )
    rows = mixed_strategies(sites, seed, STEPS, layout=layout)
    return Case(tiny, found.graph, sites, layout, rows, merge_variants=seed % 3 == 0)


def rewritten(case: Case) -> list[Tensor]:
    """Run the step programs of ``case``, one per call of a step, graph by graph."""
    programs = [
        unroll(case.rows, case.captured, case.sites, case.merge_variants, call)
        for call in calls_of(case.layout)
    ]
    results = len(outputs(case.captured.module.graph))
    states = [Caches() for _ in programs]
    graphs: dict[tuple[int, ActionRow], torch.fx.GraphModule] = {}
    found: list[Tensor] = []
    for step in range(STEPS):
        for number, program in enumerate(programs):
            actions = program.variants[program.schedule[step]]
            if (number, actions) not in graphs:
                graphs[number, actions] = step_graph(case, program, actions)
            module = graphs[number, actions]
            inputs = inputs_of(case, step, number)
            held = states[number].read(
                program.slots, step, read_slots(module.graph), inputs[0].device, {}
            )
            with torch.no_grad():
                returned = module(*inputs, *held)
            written = dict(zip(written_slots(module.graph), returned[results:], strict=True))
            states[number].write(program.slots, step, written)
            for other, state in zip(programs[number + 1 :], states[number + 1 :], strict=True):
                adopted = other.slots.adopted_at(step)
                state.adopt(other.slots, step, {slot: written[slot] for slot in adopted})
            found.append(returned[0])
    return found


def step_graph(case: Case, program: StepProgram, actions: ActionRow) -> torch.fx.GraphModule:
    module = rewrite(case.captured, program.sites, actions, case.layout)
    lower_windows(module, WindowKernel.BLOCKS)
    module.recompile()
    return module


def inputs_of(case: Case, step: int, call: int) -> list[Tensor]:
    """Return the inputs of a call: guidance in two calls shares its latents alone."""
    return [
        item + 0.5 * call if entry.name == "encoder_hidden_states" else item
        for entry, item in zip(case.captured.inputs, flat_inputs(case.tiny, step), strict=True)
    ]


def interpreted(case: Case) -> list[Tensor]:
    interpreter = PlanInterpreter(case.rows, case.sites, case.layout)
    found: list[Tensor] = []
    for step in range(STEPS):
        for call in range(case.layout.calls):
            given = case.tiny.call(step, 4)
            if "encoder_hidden_states" in given:
                given["encoder_hidden_states"] = given["encoder_hidden_states"] + 0.5 * call
            with torch.no_grad(), interpreter.step(step, call):
                found.append(case.tiny.model(**given)[0])
    return found


@pytest.mark.parametrize("head_groups", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_random_plan_equals_the_interpreter(
    layout: CfgLayout, head_groups: int, request: pytest.FixtureRequest
) -> None:
    plans = PLANS if request.config.getoption("all") else PLANS_BY_DEFAULT
    for seed in range(plans):
        case = draw(seed, layout, head_groups)
        difference = largest_difference(rewritten(case), interpreted(case))
        assert difference < 1e-4, f"seed {seed}: {difference}"
