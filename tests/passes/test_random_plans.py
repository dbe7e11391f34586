"""Rewritten graphs compute what the plan interpreter computes, for random models and plans."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from examples.whole_steps import WholeSteps
from torch import Tensor

from ditfastattn import CfgLayout
from ditfastattn.passes.analysis.output_site import output_site
from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import outputs
from ditfastattn.passes.graph.slots import read_slots, written_slots
from ditfastattn.passes.plan.actions import ActionRow
from ditfastattn.passes.plan.guidance import calls_of
from ditfastattn.passes.plan.legality import START, legal_strategies
from ditfastattn.passes.plan.step_program import StepProgram, unroll
from ditfastattn.passes.plan.strategies import Strategy, fitted_terms
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
from tests.ranges import block_range, interpreting, random_column, with_ranges

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
    if seed % 4 > 1:
        first, last = sorted(generator.choices(range(1 + seed % 2), k=2))
        sites = (*sites, block_range(found.graph, sites, first, last))
    rows = rows_of(sites, seed, STEPS, layout)
    return Case(tiny, found.graph, sites, layout, rows, merge_variants=seed % 3 == 0)


def rows_of(
    sites: Sequence[Site], seed: int, steps: int, layout: CfgLayout
) -> list[tuple[Strategy, ...]]:
    """Return random rows for ``sites``, ranges of blocks among them."""
    generator = random.Random(seed)
    inner = [site for site in sites if not site.kind.holds_others]
    if len(inner) == len(sites):
        return mixed_strategies(sites, seed, steps, layout=layout)
    ranges = [
        (site, random_column(site, steps, layout, generator))
        for site in sites
        if site.kind is SiteKind.BLOCKS
    ]
    return with_ranges(inner, ranges, seed, layout)[1]


def with_whole_steps(case: Case, seed: int) -> Case:
    """Return ``case`` with a plan of the whole output too: where that is reused, nothing runs."""
    generator = random.Random(seed)
    whole = output_site(case.captured)
    column, history = [], START
    for _ in range(STEPS):
        column.append(generator.choice(legal_strategies(whole, case.layout, history)))
        history = history.after(column[-1])
    ran = rows_of(case.sites, seed, sum(s.computes for s in column), case.layout)
    idle = (Strategy.SHARE_STEP,) * len(case.sites)
    rows = [(*(ran.pop(0) if own.computes else idle), own) for own in column]

    def coefficients(strategy: Strategy) -> tuple[tuple[float, ...], ...]:
        if not strategy.fitted:
            return ()
        count = fitted_terms(strategy.outputs_read, case.layout.batched)
        branches = range(case.layout.branches)
        return tuple(tuple(generator.gauss(0, 0.5) for _ in range(count)) for _ in branches)

    whole = replace(whole, coefficients=tuple(map(coefficients, column)))
    return replace(case, sites=(*case.sites, whole), rows=rows)


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
    inner = [site for site in case.sites if site.kind is not SiteKind.OUTPUT]
    interpreter = PlanInterpreter(case.tiny.model, case.rows, inner, case.layout)
    wholes = [WholeSteps(as_json(case), call) for call in range(case.layout.calls)]
    found: list[Tensor] = []
    with torch.no_grad(), interpreting(interpreter, case.tiny.model, inner):
        for step in range(STEPS):
            for call, whole in enumerate(wholes):
                given = case.tiny.call(step, 4)
                if "encoder_hidden_states" in given:
                    given["encoder_hidden_states"] = given["encoder_hidden_states"] + 0.5 * call
                with interpreter.step(step, call):
                    run = partial(call_model, case.tiny, given)
                    found.append(whole(step, given["hidden_states"], run))
    return found


def call_model(tiny: TinyModel, given: dict[str, Any]) -> Tensor:
    result: Tensor = tiny.model(**given)[0]
    return result


def as_json(case: Case) -> dict[str, Any]:
    """Return what a plan's JSON holds of ``case``; a plan without whole steps runs every step."""
    names = [list(map(str, row)) for row in case.rows]
    sites: list[dict[str, Any]] = [
        {"kind": str(site.kind), "coefficients": site.coefficients} for site in case.sites
    ]
    if not any(site.kind is SiteKind.OUTPUT for site in case.sites):
        names, sites = [["full"] for _ in names], [{"kind": "output"}]
    return {
        "sites": sites,
        "strategies": names,
        "sampler": {"steps": len(names), "cfg_layout": str(case.layout)},
    }


@pytest.mark.parametrize("head_groups", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_random_plan_equals_the_interpreter(
    layout: CfgLayout, head_groups: int, request: pytest.FixtureRequest
) -> None:
    plans = PLANS if request.config.getoption("all") else PLANS_BY_DEFAULT
    for seed in range(plans):
        case = draw(seed, layout, head_groups)
        if seed % 2:
            case = with_whole_steps(case, seed)
        difference = largest_difference(rewritten(case), interpreted(case))
        assert difference < 1e-4, f"seed {seed}: {difference}"
