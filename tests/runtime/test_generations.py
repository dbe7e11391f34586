"""A generation is recognised as one: where it begins, how many steps it has, whose it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ditfastattn import CfgLayout, Plan, Strategy
from ditfastattn.passes.analysis.fingerprint import fingerprint
from ditfastattn.passes.plan.schema import Calibration, Sampler
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.matching import input_shapes
from ditfastattn.runtime.options import BackendOptions
from ditfastattn.runtime.reference import PlanInterpreter
from ditfastattn.runtime.specializations import Specialization, specialization_of
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    captured_once,
    largest_difference,
    noise,
)

BATCH = 2
F, S, C = Strategy.FULL, Strategy.SHARE_STEP, Strategy.SHARE_CFG


class Stepped:
    """Run the captured graph of a tiny model as the backend does, without Dynamo."""

    def __init__(self, tiny: TinyModel, **options: Any) -> None:
        self.found = captured_once(tiny, BATCH)
        chosen = BackendOptions(lowering=Lowering.EAGER, **options)
        self.specialization: Specialization = specialization_of(self.found.graph, chosen)

    def __call__(self, **call: Any) -> tuple[Any, ...]:
        static = iter(self.found.static)
        inputs = self.found.graph.inputs
        tensors = [next(static) if entry.static else call[entry.name] for entry in inputs]
        with torch.no_grad():
            return self.specialization.step(tensors)

    @property
    def plan(self) -> Plan:
        """Return the plan in force."""
        (report,) = self.specialization.reports()
        return report.plan


def plan_of(
    tiny: TinyModel,
    steps: Sequence[Strategy],
    timesteps: Sequence[float],
    layout: CfgLayout = CfgLayout.COND_FIRST,
) -> Plan:
    """Return a plan in which every site takes the same strategy at a step."""
    found = captured_once(tiny, BATCH)
    return Plan(
        model=fingerprint(found.graph, found.every, found.static),
        inputs=input_shapes(found.graph),
        sampler=Sampler(steps=len(steps), timesteps=tuple(timesteps), cfg_layout=layout),
        sites=tuple(site.planned() for site in found.every),
        strategies=tuple((strategy,) * len(found.every) for strategy in steps),
        calibration=Calibration(method="manual"),
    )


def call_at(
    tiny: TinyModel, timestep: float, image: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return a call with the latents ``image``, twice as batched guidance has them."""
    latents = noise(image, 1, 4, 8, 8).repeat(BATCH, 1, 1, 1)
    times = torch.full((BATCH,), timestep, dtype=dtype)
    return {**tiny.call(0, BATCH), "hidden_states": latents, "timestep": times}


def branch_call(tiny: TinyModel, timestep: float, image: int, branch: int) -> dict[str, Any]:
    """Return one of guidance's two calls: the same latents, conditions of its own."""
    made = call_at(tiny, timestep, image)
    for name in ("class_labels", "encoder_hidden_states", "pooled_projections"):
        if name in made:
            made[name] = made[name].flip(0) if branch else made[name]
    return made


# Two calls a step ---------------------------------------------------------------------------------

TIMES = (900.0, 750.0, 600.0, 450.0)


@pytest.mark.parametrize("steps", [(C, S, F, S), (C, C, F, C)])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_guidance_may_be_shared_at_the_first_step(name: str, steps: Sequence[Strategy]) -> None:
    tiny = TINY_MODELS[name]()
    every = captured_once(tiny, BATCH).every
    plan = plan_of(tiny, steps, TIMES, CfgLayout.SEPARATE)
    calls = [(step, branch) for step in range(len(steps)) for branch in range(2)]
    interpreter = PlanInterpreter(plan.strategies, every, CfgLayout.SEPARATE)
    expected = []
    for step, branch in calls:
        with torch.no_grad(), interpreter.step(step, branch):
            call = branch_call(tiny, TIMES[step], step, branch)
            expected.append(tiny.model(**call)[0])
    model = Stepped(tiny, plan=plan)
    for _ in range(2):
        got = [model(**branch_call(tiny, TIMES[s], s, branch))[0] for s, branch in calls]
        assert largest_difference(got, expected) < 1e-5
