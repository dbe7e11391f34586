"""Make plans for pipelines without searching them, and generate as the plan interpreter does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from examples.whole_steps import WholeSteps
from torch import Tensor

from ditfastattn import accelerate, restore
from ditfastattn.passes.analysis.fingerprint import module_fingerprint
from ditfastattn.passes.analysis.output_site import OUTPUT
from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.planned_site import PlannedSite
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.call_order import Call, calls_in_order
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.pipeline.forwards import Forward, replace_forward
from ditfastattn.runtime.pipeline.model_call import bound_arguments, output_of, with_output
from ditfastattn.runtime.pipeline.prompts import Prompt, generate, split_prompts
from ditfastattn.runtime.reference import PlanInterpreter
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.steppers import DenseStepper
from ditfastattn.runtime.search.record.planned_target import record_target
from ditfastattn.runtime.search.record.record_plan import record_plan
from ditfastattn.tools.zoo.trial import mixed_strategies

Around = Callable[[Call], AbstractContextManager[Any]]


def _alone(_call: Call) -> AbstractContextManager[None]:
    return nullcontext()


def plan_for(
    pipeline: Any,
    call: Mapping[str, Any],
    strategies: Sequence[Strategy],
    target: Target | None = None,
) -> Plan:
    """Return a plan that takes ``strategies[step]`` at every site where it is legal."""
    prompt = split_prompts(call, 0)[0]
    with open_session(pipeline, prompt) as session:
        session.run(DenseStepper(session), prompt)
        rows = [
            tuple(Strategy.FULL if why_not(wanted, site) else wanted for site in session.sites)
            for wanted in strategies
        ]
        recorded = None if target is None else record_target(target)
        return record_plan(
            session, rows, session.timesteps, Calibration(method="manual", target=recorded)
        )


def opaque_plan_for(pipeline: Any, call: Mapping[str, Any], strategies: Sequence[Strategy]) -> Plan:
    """Return a plan that takes ``strategies[step]`` for the whole output, and calls it as it is.

    The transformer's output is shaped like its latent.
    """
    plan = plan_for(pipeline, call, strategies)
    shape = plan.inputs["hidden_states"]
    output = PlannedSite(
        name=OUTPUT,
        kind=SiteKind.OUTPUT,
        tokens=shape[1] * shape[2],
        heads=1,
        head_dim=shape[0],
        window=0,
        latent="hidden_states",
    )
    changes = {
        "model": module_fingerprint(pipeline.transformer),
        "inputs": {"hidden_states": shape},
        "sites": (output,),
        "strategies": tuple((strategy,) for strategy in strategies),
    }
    return plan.model_copy(update=changes)


def by_example(pipeline: Any, plan: Plan, prompt: Prompt, around: Around = _alone) -> Tensor:
    """Return the images of a generation whose whole steps ``examples/whole_steps.py`` runs.

    ``around`` gives the context in which the model is called at a step that runs.
    """
    data = json.loads(plan.model_dump_json())
    wholes = [WholeSteps(data, call) for call in range(plan.sampler.cfg_layout.calls)]
    module = transformer_of(pipeline, "test")
    latent_name = next(site.latent for site in plan.sites if site.kind is SiteKind.OUTPUT)
    made: list[Any] = []
    calls = iter(calls_in_order(plan.sampler.spans))

    def by_step(forward: Forward) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = next(calls)

            def compute() -> Tensor:
                with around(call):
                    made.append(forward(*args, **kwargs))
                return output_of(made[-1])

            latent = bound_arguments(type(module), args, kwargs)[latent_name]
            output = wholes[call.branch](call.step, latent, compute)
            return with_output(made[-1], output)

        return run

    return generate_by(pipeline, by_step, prompt)


def generate_by(
    pipeline: Any, by_step: Callable[[Forward], Callable[..., Any]], prompt: Prompt
) -> Tensor:
    """Return the images of a generation whose denoiser's forward is replaced."""
    undo = replace_forward(transformer_of(pipeline, "test"), by_step)
    try:
        images: Tensor = generate(pipeline, prompt)
        return images
    finally:
        undo()


@dataclass(frozen=True)
class MixedPlan:
    """Hold a plan in which every legal strategy may occur, and the sites it speaks of."""

    plan: Plan
    sites: tuple[Site, ...]

    def interpret(self, pipeline: Any, prompt: Prompt) -> Tensor:
        """Return the images of a generation whose transformer the plan interpreter runs."""
        spans = self.plan.sampler.spans
        interpreters = [  # each phase is interpreted as a generation of its own
            PlanInterpreter(
                pipeline.transformer,
                self.plan.strategies[steps.start : steps.stop],
                self.sites,
                layout,
            )
            for steps, layout in spans
        ]

        def interpreted(call: Call) -> PlanInterpreter:
            step = call.step - spans[call.phase][0].start
            return interpreters[call.phase].step(step, call.branch)

        if any(site.kind is SiteKind.OUTPUT for site in self.plan.sites):
            return by_example(pipeline, self.plan, prompt, interpreted)
        calls = iter(calls_in_order(spans))

        def by_step(forward: Forward) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with interpreted(next(calls)):
                    return forward(*args, **kwargs)

            return run

        return generate_by(pipeline, by_step, prompt)


def mixed_plan_for(pipeline: Any, call: Mapping[str, Any], seed: int = 0) -> MixedPlan:
    """Return a plan for ``pipeline`` that mixes all that is legal."""
    prompt = split_prompts(call, 0)[0]
    with open_session(pipeline, prompt) as session:
        rows = mixed_strategies(session.sites, seed, session.steps, layout=session.layout)
        session.run(DenseStepper(session), prompt)
        plan = record_plan(session, rows, session.timesteps, Calibration(method="manual"))
        return MixedPlan(plan, session.sites)


def assert_interprets(
    pipeline: Any,
    call: Mapping[str, Any],
    mixed: MixedPlan,
    lowering: str = "eager",
    within: float = 1e-4,
) -> None:
    """Accelerate ``pipeline``; its images must be the interpreter's, and not the dense ones."""
    prompt = Prompt(call, 5)
    dense, expected = generate(pipeline, prompt), mixed.interpret(pipeline, prompt)
    assert float((expected - dense).abs().max()) > 1e-3
    accelerate(pipeline, mixed.plan, lowering=lowering)
    got, again = generate(pipeline, prompt), generate(pipeline, prompt)
    restore(pipeline)
    assert float((got - expected).abs().max()) < within
    assert float((got - dense).abs().max()) > 1e-3
    assert torch.equal(again, got)
