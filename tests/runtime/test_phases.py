"""Guidance that is on for an interval only: a plan has phases, and each runs as it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import ditfastattn
from ditfastattn import (
    ConfigError,
    Plan,
    Strategy,
    Target,
    accelerate,
    calibrate,
    dense_generations,
    restore,
)
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.phases import Phase
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.runtime.search.judge.targets import TargetKind
from ditfastattn.tools.commands.inspect_graph import write_graphs
from ditfastattn.tools.zoo.trial import mixed_strategies
from tests.plans import MixedPlan, mixed_plan_for
from tests.runtime.test_pipelines import Pipeline
from tests.tiers import slow
from tests.works_with import works_with


@pytest.fixture
def accelerated() -> Iterator[Callable[..., Any]]:
    """Accelerate pipelines, and restore them at the end."""
    with ExitStack() as undo:

        def run(pipeline: Any, plan: Plan | None = None, **options: Any) -> Any:
            undo.callback(restore, pipeline)
            return accelerate(pipeline, plan, lowering="eager", **options)

        yield run


CALL: dict[str, Any] = {"labels": [1], "num_inference_steps": 6}


class Interval(Pipeline):
    """Guide the steps ``guided`` only, as ``guidance_start`` and ``guidance_end`` do."""

    def __init__(self, order: str, guided: range) -> None:
        super().__init__(order)
        self.guided = guided

    def _guides(self, step: int) -> bool:
        return step in self.guided


def phases_of(layout: CfgLayout, guided: range, steps: int) -> tuple[Phase, ...]:
    """Return the phases of a generation that guides the steps ``guided``."""
    at = [layout if step in guided else CfgLayout.NONE for step in range(steps)]
    return tuple(Phase(steps=len(list(run)), cfg_layout=each) for each, run in groupby(at))


def mixed_plan(order: str, guided: range) -> MixedPlan:
    """Return a plan with phases that takes all that is legal in each."""
    made = mixed_plan_for(Interval(order, range(6)), CALL)
    layout = CfgLayout(order)
    sampler = made.plan.sampler.model_copy(update={"phases": phases_of(layout, guided, 6)})
    rows = tuple(
        tuple(row)
        for seed, (steps, here) in enumerate(sampler.spans)
        for row in mixed_strategies(made.sites, seed, len(steps), layout=here)
    )
    data = made.plan.model_copy(update={"sampler": sampler, "strategies": rows})
    return replace(made, plan=Plan.parse(data.model_dump_json()))


@works_with(
    "Guidance",
    "guidance for an interval only (`guidance_start`/`guidance_end`, a cutoff callback)",
    "works",
    "the plan has phases; strategies start over where guidance is switched",
)
@pytest.mark.parametrize(
    ("order", "guided"),
    [
        ("cond-first", range(3)),
        slow(("uncond-first", range(2, 4))),
        slow(("separate", range(1, 4))),
    ],
    ids=["cutoff", "interval", "two-calls"],
)
def test_phases_run_as_the_interpreter_runs_them(
    order: str, guided: range, accelerated: Callable[..., Any]
) -> None:
    made = mixed_plan(order, guided)
    assert made.plan.changed > 0
    assert any(strategy.shares_guidance for row in made.plan.strategies for strategy in row)
    pipeline: Any = Interval(order, guided)
    wanted = {
        (label, seed): made.interpret(pipeline, Prompt({**CALL, "labels": label}, seed))
        for label, seed in (((1,), 5), ((1, 3), 6))[: 2 if guided.start else 1]
    }
    accelerated(pipeline, made.plan)
    for (label, seed), images in (*wanted.items(), *wanted.items()):
        got = generate(pipeline, Prompt({**CALL, "labels": list(label)}, seed))
        assert float((got - images).abs().max()) < 1e-5


@works_with(
    "Guidance",
    "guidance for another interval than the plan's",
    "refused",
    "what was seen at which step, before it runs; with `on_mismatch='dense'` the rest is dense",
)
@pytest.mark.parametrize(
    ("order", "planned", "guided", "seen"),
    [
        slow(
            (
                "cond-first",
                range(3),
                range(2),
                r"1 row\(s\) at step 2[\s\S]*2 row\(s\) at steps 0-2",
            )
        ),
        slow(
            (
                "cond-first",
                range(3),
                range(4),
                r"2 row\(s\) at step 3, as if[\s\S]*switched on",
            )
        ),
        slow(
            (
                "cond-first",
                range(6),
                range(2),
                r"1 row\(s\) at step 2[\s\S]*steps 0-5",
            )
        ),
        slow(("separate", range(3), range(2), r"1 call at step 2[\s\S]*2 call\(s\) at steps 0-2")),
        slow(("separate", range(3), range(4), r"a further call at step 3")),
    ],
    ids=["earlier", "later", "never-planned", "separate-earlier", "separate-later"],
)
def test_another_interval_is_refused_as_it_shows(
    order: str, planned: range, guided: range, seen: str, accelerated: Callable[..., Any]
) -> None:
    pipeline: Any = Interval(order, planned)
    plan = mixed_plan_for(pipeline, CALL).plan if planned == range(6) else None
    accelerated(pipeline, plan or mixed_plan(order, planned).plan)
    generate(pipeline, Prompt(CALL, 5))
    pipeline.guided = guided
    with pytest.raises(ConfigError, match=seen) as raised:
        generate(pipeline, Prompt(CALL, 5))
    assert "scheduler" not in str(raised.value)
    pipeline.guided = planned
    generate(pipeline, Prompt(CALL, 5))  # what was refused leaves nothing


def test_another_interval_may_run_dense(accelerated: Callable[..., Any]) -> None:
    pipeline: Any = Interval("cond-first", range(3))
    accelerated(pipeline, mixed_plan("cond-first", range(3)).plan, on_mismatch="dense")
    planned = generate(pipeline, Prompt(CALL, 5))
    pipeline.guided = range(2)
    assert generate(pipeline, Prompt(CALL, 5)).isfinite().all()
    ((reason, count),) = dense_generations(pipeline).items()
    assert (count, "1 row(s) at step 2" in reason) == (1, True)
    pipeline.guided = range(3)
    assert torch.equal(generate(pipeline, Prompt(CALL, 5)), planned)


@pytest.mark.slow
def test_a_generation_that_takes_turns_with_another_has_its_own_phases(
    accelerated: Callable[..., Any],
) -> None:
    pipeline: Any = Interval("cond-first", range(3))
    made = mixed_plan("cond-first", range(3))
    prompts = [Prompt({**CALL, "labels": [label]}, label) for label in (1, 2)]
    wanted = [made.interpret(pipeline, prompt) for prompt in prompts]
    accelerated(pipeline, made.plan)
    for prompt, images in zip(prompts, wanted, strict=True):
        with ditfastattn.generation():
            got = generate(pipeline, prompt)
        assert float((got - images).abs().max()) < 1e-5


@pytest.mark.parametrize("order", ["cond-first", slow("separate")])
def test_without_a_plan_a_switch_of_guidance_is_refused(
    order: str, accelerated: Callable[..., Any]
) -> None:
    pipeline: Any = Interval(order, range(4))
    accelerated(pipeline, threshold=0.2)
    for _ in range(3):  # each time: no plan of four steps comes of it
        with pytest.raises(ConfigError, match=r"2 row\(s\) up to step 3, then 1|2 calls in a row"):
            generate(pipeline, Prompt(CALL, 5))


def test_a_phase_begins_with_what_it_computes_itself() -> None:
    made = mixed_plan("cond-first", range(3)).plan
    rows = [(Strategy.FULL,) * len(made.sites) for _ in made.strategies]
    rows[3] = (Strategy.SHARE_STEP,) * len(made.sites)
    data = made.model_copy(update={"strategies": tuple(rows)}).model_dump_json()
    with pytest.raises(ConfigError, match="since the phase began at step 3"):
        Plan.parse(data)


@pytest.mark.parametrize(
    ("phases", "reason"),
    [
        ([(3, "cond-first"), (2, "none")], "they hold 5 steps, of 6"),
        ([(3, "cond-first"), (3, "cond-first")], "one phase"),
        ([(3, "uncond-first"), (3, "none")], "must be cond-first or none"),
    ],
)
def test_phases_that_cannot_be_are_refused(phases: list[tuple[int, str]], reason: str) -> None:
    made = mixed_plan("cond-first", range(3)).plan
    given = tuple(Phase(steps=steps, cfg_layout=CfgLayout(layout)) for steps, layout in phases)
    sampler = made.sampler.model_copy(update={"phases": given})
    data = made.model_copy(update={"sampler": sampler}).model_dump_json()
    with pytest.raises(ConfigError, match=reason):
        Plan.parse(data)


class Pictures(Interval):
    """Return an image's values."""

    def _decoded(self, latents: Tensor) -> Tensor:
        return latents.sigmoid()


@works_with(
    "Guidance",
    "`calibrate` of guidance for an interval only",
    "works",
    "whole steps and sites for a quality, whole steps for a speedup, sites for a quality or a "
    "threshold: phase by phase, then measured together; sites for a speed are refused",
)
@pytest.mark.parametrize(
    ("order", "guided", "target"),
    [
        slow(("cond-first", range(3), Target.min_psnr(20.0))),
        ("uncond-first", range(1, 3), Target.threshold(0.5)),
        slow(("separate", range(3), Target.min_psnr(20.0))),
    ],
    ids=["cutoff", "interval", "two-calls"],
)
def test_phases_are_calibrated(
    order: str, guided: range, target: Target, accelerated: Callable[..., Any]
) -> None:
    pipeline: Any = Pictures(order, guided)
    steps = 6 if target.kind is TargetKind.QUALITY else 4
    call = {**CALL, "num_inference_steps": steps}
    dense = generate(pipeline, Prompt(call, 5))
    options: dict[str, Any] = {"objective": "flops", "lowering": "eager"}
    plan = calibrate(pipeline, call, target=target, **options)
    assert plan.sampler.steps == steps
    assert plan.sampler.phases == phases_of(CfgLayout(order), guided, steps)
    assert plan.sampler.timesteps == tuple(pipeline.scheduler.timesteps.tolist())
    assert plan.changed > 0
    accelerated(pipeline, plan)
    images = generate(pipeline, Prompt(call, 5))
    assert float((images - dense).abs().max()) > 0.0
    if target.kind is TargetKind.QUALITY:
        assert plan.calibration.held_out is not None
        assert plan.calibration.held_out.worst >= 20.0


@pytest.mark.parametrize(
    "options",
    [
        {"target": Target.min_speedup(1.1), "method": "global"},
        {"target": Target.max_latency(1.0)},
        {"target": Target.min_psnr(20.0), "max_variants": 2},
    ],
    ids=["speed-of-sites", "latency", "variants"],
)
def test_what_phases_cannot_be_calibrated_for_is_refused(options: dict[str, Any]) -> None:
    pipeline: Any = Pictures("cond-first", range(3))
    with pytest.raises(ConfigError, match="guidance"):
        calibrate(pipeline, CALL, lowering="eager", **options)


def test_the_graph_of_a_step_is_its_phases(tmp_path: Path) -> None:
    made, pipeline = mixed_plan("cond-first", range(3)), Interval("cond-first", range(3))
    for step, rows in ((1, 2), (4, 1)):
        write_graphs(Console(quiet=True), pipeline, made.plan, CALL, step, tmp_path / str(step))
        text = next(iter(sorted((tmp_path / str(step)).glob("*.txt")))).read_text()
        assert f"[{rows}, 4, 8, 8]" in text
