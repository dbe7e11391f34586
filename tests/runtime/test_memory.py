"""Nothing of a model stays when it dies, and nothing of a prompt when its generation ends."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

import ditfastattn
from ditfastattn import CfgLayout, ConfigError, Plan, Strategy
from ditfastattn.runtime import specializations
from ditfastattn.runtime.model_state import ModelState
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from tests.helpers import (
    STEPS,
    TINY_DIGITS,
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    captured_once,
    largest_difference,
    make_plan,
    tiny_digits_pipeline,
    tiny_dit,
    uniform_strategies,
)
from tests.plans import mixed_plan_for, plan_for
from tests.tiny_pipelines import TINY_PIPELINES
from tests.works_with import works_with

CALL: dict[str, Any] = {"class_labels": [1], "num_inference_steps": 3}
MEBIBYTE = 2**20


def pipeline() -> DigitsPipeline:
    return tiny_digits_pipeline(DDIMScheduler(clip_sample=False))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(pipeline(), CALL, [Strategy.FULL, Strategy.SHARE_STEP, Strategy.SHARE_STEP])


def states() -> list[ModelState]:
    return [state for found in specializations._registry for state in found.models.here()]


def accelerated_round(
    plan: Plan | None,
    restored: bool,
    seed: int,
    make: Callable[[], Any] = pipeline,
    call: dict[str, Any] = CALL,
) -> weakref.ref[Any]:
    """Create a pipeline, accelerate it, run it, and drop it; return a reference to its model."""
    made = make()
    options: dict[str, Any] = {} if plan else {"threshold": 0.3}
    ditfastattn.accelerate(made, plan, lowering="eager", **options)
    for _ in range(2):
        generate(made, Prompt(call, seed))
    if restored:
        ditfastattn.restore(made)
    return weakref.ref(made.transformer)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(
    ("planned", "restored"),
    [
        pytest.param(True, False, id="planned-kept"),
        pytest.param(True, True, id="planned-restored", marks=pytest.mark.slow),
        pytest.param(False, True, id="self-calibrated-restored", marks=pytest.mark.slow),
        pytest.param(False, False, id="self-calibrated-kept", marks=pytest.mark.slow),
    ],
)
def test_an_accelerated_model_dies_with_all_its_state(
    planned: bool, restored: bool, plan: Plan
) -> None:
    torch._dynamo.reset()
    gc.collect()
    known = len(states()), len(specializations._registry)
    for seed in range(2):
        model = accelerated_round(plan if planned else None, restored, seed)
        gc.collect()
        assert model() is None
        assert (len(states()), len(specializations._registry)) == known


@pytest.mark.slow
@pytest.mark.parametrize("restored", [True, False], ids=["restored", "kept"])
def test_accelerated_models_leave_no_memory(restored: bool, plan: Plan) -> None:
    alive: list[weakref.ref[Any]] = []
    begun = 0
    for seed in range(25):
        alive.append(accelerated_round(plan, restored, seed))
        gc.collect()
        if seed == 4:
            begun = resident_bytes()
    assert not any(model() for model in alive)
    # torch keeps the source of each graph that it has generated code for, here 0.15 MiB a round.
    assert resident_bytes() - begun < 8 * MEBIBYTE


def shared_layers(plan: Plan, number: int) -> Plan:
    """Return ``plan`` with another choice of sites at its last step for each ``number``."""
    *rows, last = plan.strategies
    bits = [number >> place & 1 for place in range(len(last))]
    row = tuple(s if bit else Strategy.FULL for s, bit in zip(last, bits, strict=True))
    return plan.model_copy(update={"strategies": (*rows, row)})


@works_with(
    "Several plans",
    "fifty plans in one process, one after the other",
    "works",
    "what is compiled is shared",
)
@pytest.mark.parametrize("plans", [pytest.param(50, marks=pytest.mark.slow), 4])
def test_many_plans_run_in_one_process(
    plans: int, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    made = pipeline()
    monkeypatch.setattr("ditfastattn.runtime.lowering._COMPILATIONS", 2)  # all share what is one
    known, begun = 0, 0
    for number in range(plans):
        ditfastattn.accelerate(made, shared_layers(plan, number % 16), lowering="eager")
        generate(made, Prompt(CALL, 3))
        gc.collect()
        if number == 1:
            known, begun = len(specializations._registry), resident_bytes()
    assert len(specializations._registry) == known
    assert resident_bytes() - begun < 16 * MEBIBYTE


def test_more_plans_than_dynamo_compiles_run_too(plan: Plan) -> None:
    torch._dynamo.reset()
    made = pipeline()
    plain: Any = made.transformer
    with torch._dynamo.config.patch(recompile_limit=2):  # it is set back at the end
        for number in range(4):
            options: dict[str, Any] = {"plan": shared_layers(plan, number), "lowering": "eager"}
            compiled: Any = torch.compile(plain, backend="ditfastattn", options=options)
            made.transformer = compiled
            generate(made, Prompt(CALL, 3))
            assert options["plan"] in [report.plan for report in ditfastattn.reports()]


def test_too_many_structures_are_an_error_with_the_remedy(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("ditfastattn.runtime.lowering._COMPILATIONS", 1)
    for number, wanted in ((1, True), (2, False)):
        config: dict[str, Any] = TINY_DIGITS | {"num_layers": number}
        scheduler: Any = DDIMScheduler()
        made = DigitsPipeline(DiTTransformer2DModel(**config).eval(), scheduler)
        made.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
        ditfastattn.accelerate(made, lowering="eager", dense=True)
        if wanted:
            generate(made, Prompt(CALL, 0))
            continue
        with pytest.raises(ConfigError, match=r"too many transformers[\s\S]*reset\(\)"):
            generate(made, Prompt(CALL, 0))


@works_with(
    "Copies and processes",
    "fifty pipelines, accelerated and dropped without `restore`",
    "works",
    "no memory stays",
)
@pytest.mark.slow
@pytest.mark.parametrize(("name", "rounds"), [("pixart", 50), ("wan", 25)])  # wan: in two calls
def test_fifty_pipelines_leave_no_memory(name: str, rounds: int) -> None:
    make, own = TINY_PIPELINES[name]
    call = {**own, "num_inference_steps": 2}
    chosen = mixed_plan_for(make(), call).plan
    alive: list[weakref.ref[Any]] = []
    begun = 0
    for seed in range(rounds):
        alive.append(accelerated_round(chosen, False, seed, make, call))
        gc.collect()
        if seed == 9:
            begun = resident_bytes()
    assert not any(model() for model in alive)
    assert resident_bytes() - begun < 16 * MEBIBYTE  # of torch's own, as above


def test_models_of_many_structures_may_be_accelerated() -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in range(4):
            config = TINY_DIGITS | {"num_layers": 1, "norm_eps": 1e-5 * (number + 1)}
            scheduler: Any = DDIMScheduler()
            made = DigitsPipeline(DiTTransformer2DModel(**config).eval(), scheduler)
            made.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
            dense = generate(made, Prompt(CALL, 0))
            ditfastattn.accelerate(made, lowering="eager", dense=True)
            assert torch.equal(generate(made, Prompt(CALL, 0)), dense)


@pytest.mark.slow
def test_a_model_outside_of_a_pipeline_dies_with_its_state() -> None:
    torch._dynamo.reset()
    gc.collect()
    known = len(states())
    options: dict[str, Any] = {"lowering": "eager", "cfg_layout": CfgLayout.COND_FIRST}
    for steps in (3, 2 * STEPS):  # in the middle of its calibration, and after it
        tiny = tiny_dit.__wrapped__(seed=7)
        compiled: Any = torch.compile(
            tiny.model, backend="ditfastattn", fullgraph=True, options=options
        )
        with torch.no_grad():
            for step in range(steps):
                compiled(**tiny.call(step % STEPS, 4))
        assert len(states()) == known + 1
        model = weakref.ref(tiny.model)
        del tiny, compiled
        gc.collect()
        assert model() is None
        assert len(states()) == known


def test_the_death_of_one_model_leaves_the_generation_of_another() -> None:
    torch._dynamo.reset()
    first = tiny_dit()
    other = tiny_dit.__wrapped__(seed=8)
    second: TinyModel | None = other
    options: dict[str, Any] = {"lowering": "eager", "cfg_layout": CfgLayout.COND_FIRST}
    compile_: Callable[[TinyModel], Any] = lambda tiny: torch.compile(  # noqa: E731
        tiny.model, backend="ditfastattn", fullgraph=True, options=options
    )
    kept = compile_(first)
    dropped: Callable[..., Any] | None = compile_(other)
    del other
    alone = [first.run(kept) for _ in range(2)][1]
    got = []
    with torch.no_grad():
        for step in range(STEPS):
            got.append(kept(**first.call(step, 4))[0])
            if second is not None and dropped is not None and step < 2:
                dropped(**second.call(step, 4))
            elif step == 2:
                second = dropped = None
                gc.collect()
    assert largest_difference(got, alone) == 0.0


def test_prompt_embeddings_are_dropped_after_the_last_step() -> None:
    torch._dynamo.reset()
    tiny = TINY_MODELS["pixart"]()
    _, sites = capture_every_site(tiny)
    plan = make_plan(tiny, uniform_strategies(sites, Strategy.SHARE_STEP), feed_forwards=True)
    options: dict[str, Any] = {"lowering": "eager", "plan": plan}
    compiled: Any = torch.compile(
        tiny.model, backend="ditfastattn", fullgraph=True, options=options
    )
    given: dict[str, Any] = {}
    seen: list[weakref.ref[Tensor]] = []
    call: dict[str, Any] = {}
    for step in range(STEPS):
        call = tiny.call(step, 4)
        given = given or {name: call[name] for name in ("encoder_hidden_states",)}
        seen.append(weakref.ref(given["encoder_hidden_states"]))
        with torch.no_grad():
            compiled(**call | given)
    del given, call
    gc.collect()
    assert not any(embedding() is not None for embedding in seen)
    assert captured_once(tiny) is not None  # the model lives
