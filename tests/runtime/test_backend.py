"""``torch.compile(model, backend="ditfastattn")`` as users call it."""

from __future__ import annotations

import copy
import gc
import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ditfastattn import CfgLayout, ConfigError, Plan, Strategy, reports, reset
from ditfastattn.passes.graph.slots import Slot
from ditfastattn.runtime import specializations
from ditfastattn.runtime.generation import GuidanceBranch
from ditfastattn.runtime.model_state import ModelState
from tests.helpers import (
    STEPS,
    TIMESTEPS,
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    capture_sites,
    captured_once,
    largest_difference,
    make_plan,
    mixed_strategies,
    noise,
    tiny_dit,
    tiny_sd3,
    uniform_strategies,
)
from tests.works_with import works_with

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EAGER = {"lowering": "eager"}


def planned(tiny: TinyModel, **options: Any) -> Any:
    return torch.compile(
        tiny.model, backend="ditfastattn", fullgraph=True, options={**EAGER, **options}
    )


def plan_for(tiny: TinyModel, strategies: Sequence[Sequence[Strategy]] | None = None) -> Plan:
    """Return a plan with ``strategies``, mixed ones by default; Dynamo forgets the capture."""
    _, sites = capture_sites(tiny)
    plan = make_plan(tiny, strategies or mixed_strategies(sites, seed=1))
    torch._dynamo.reset()
    return plan


def uniform_plan(tiny: TinyModel, strategy: Strategy) -> Plan:
    _, sites = capture_sites(tiny)
    return plan_for(tiny, uniform_strategies(sites, strategy))


def expected(tiny: TinyModel, plan: Plan) -> list[torch.Tensor]:
    return tiny.reference(plan.strategies, captured_once(tiny).sites, plan.sampler.cfg_layout)


def test_a_plan_runs_from_its_file_over_generations(tmp_path: Path) -> None:
    tiny = tiny_dit()
    plan = plan_for(tiny)
    plan.save(tmp_path / "plan.json")
    compiled = planned(tiny, plan=str(tmp_path / "plan.json"))
    for _ in range(2):
        assert largest_difference(tiny.run(compiled), expected(tiny, plan)) < 1e-5


def test_dense_when_told_so() -> None:
    tiny = tiny_dit()
    assert largest_difference(tiny.run(planned(tiny, dense=True)), tiny.run(tiny.model)) == 0.0


@pytest.mark.slow  # test_equivalence.py compiles windows among other strategies by default
def test_inductor_lowers_a_window_and_its_residual() -> None:
    tiny = tiny_dit()
    plan = uniform_plan(tiny, Strategy.WINDOW)
    options: dict[str, Any] = {"plan": plan}
    compiled = torch.compile(tiny.model, backend="ditfastattn", fullgraph=True, options=options)
    assert largest_difference(tiny.run(compiled), expected(tiny, plan)) < 1e-5


def test_without_a_plan_the_first_generation_calibrates_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny = tiny_dit()
    compiled = planned(tiny, threshold=0.2, cfg_layout="cond-first")
    with caplog.at_level(logging.WARNING, logger="ditfastattn"):
        first = tiny.run(compiled)
        second = tiny.run(compiled)
    messages = [record.getMessage() for record in caplog.records]
    assert "no plan was given" in messages[0]
    assert "calibrated: 6 steps x 3 sites" in messages[1]
    assert largest_difference(first, second) < 1e-5  # calibration returns the planned trajectory
    assert largest_difference(second, tiny.run(tiny.model)) > 1e-4
    (report,) = [r for r in reports() if r.plan.sampler.timesteps == TIMESTEPS]
    assert report.plan.calibration.method == "greedy"
    assert report.planned is not None
    assert report.planned.attention < report.dense.attention


def test_a_plan_that_changes_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tiny = tiny_dit()
    plan = uniform_plan(tiny, Strategy.FULL)
    tiny.run(planned(tiny, plan=plan), steps=1)
    assert "the plan changes nothing" in caplog.text


@works_with(
    "Pipelines",
    "another batch size",
    "works",
    "compiled once more",
)
def test_another_batch_size_works_and_keeps_its_own_caches() -> None:
    tiny = tiny_dit()
    plan = plan_for(tiny)
    compiled = planned(tiny, plan=plan)
    alone = tiny.run(planned(tiny, plan=plan), batch=2)
    small, large = [], []
    with torch.no_grad():
        for step in range(STEPS):  # two generations of different batch, interleaved
            small.append(compiled(**tiny.call(step, 2))[0])
            large.append(compiled(**tiny.call(step, 4))[0])
    assert largest_difference(large, expected(tiny, plan)) < 1e-5
    assert largest_difference(small, alone) < 1e-5


@works_with(
    "Other calls than the plan's",
    "prompts of another length, where the pipeline does not pad them",
    "refused",
)
def test_another_text_length_is_refused_by_name() -> None:
    tiny = tiny_sd3()
    compiled = planned(tiny, plan=plan_for(tiny))
    call = tiny.call(0, 4) | {"encoder_hidden_states": noise(1, 4, 7, 16)}
    message = r"plan.inputs.encoder_hidden_states[\s\S]*got: +\(7, 16\)[\s\S]*expected: \(5, 16\)"
    with torch.no_grad(), pytest.raises(ConfigError, match=message):
        compiled(**call)


def test_images_without_guidance_are_refused_by_a_plan_that_shares_it() -> None:
    tiny = tiny_dit()
    plan = uniform_plan(tiny, Strategy.SHARE_CFG)
    call = tiny.call(0, 4) | {"hidden_states": noise(5, 4, 4, 8, 8)}
    refused = r"hidden_states[\s\S]*different latents"
    with torch.no_grad(), pytest.raises(ConfigError, match=refused):
        planned(tiny, plan=plan)(**call)


@works_with(
    "Weights",
    "other weights than the plan's",
    "refused",
)
def test_other_weights_are_refused() -> None:
    plan = plan_for(tiny_dit(seed=0))
    other = tiny_dit(seed=1)
    with pytest.raises(ConfigError, match=r"plan.model.weights"):
        other.run(planned(other, plan=plan), steps=1)


@works_with(
    "Weights",
    "another dtype than the plan's",
    "refused",
)
def test_another_dtype_is_refused() -> None:
    tiny = tiny_dit()
    plan = plan_for(tiny)
    tiny = TinyModel(copy.deepcopy(tiny.model).to(torch.bfloat16), tiny.call)
    call = tiny.call(0, 4)
    call["hidden_states"] = call["hidden_states"].bfloat16()
    with torch.no_grad(), pytest.raises(ConfigError, match=r"plan.model.dtype[\s\S]*bfloat16"):
        planned(tiny, plan=plan)(**call)


def test_another_schedule_is_refused_and_the_next_generation_is_sound() -> None:
    tiny = tiny_dit()
    plan = plan_for(tiny)
    compiled = planned(tiny, plan=plan)
    with torch.no_grad():
        compiled(**tiny.call(0, 4))
        with pytest.raises(ConfigError, match="unexpected timestep at step"):
            compiled(**tiny.call(2, 4))
    assert largest_difference(tiny.run(compiled), expected(tiny, plan)) < 1e-5


def test_an_interrupted_generation_can_be_reset() -> None:
    tiny = tiny_dit()
    plan = plan_for(tiny)
    compiled = planned(tiny, plan=plan)
    tiny.run(compiled, steps=3)
    reset()
    assert largest_difference(tiny.run(compiled), expected(tiny, plan)) < 1e-5


@works_with(
    "Pipelines",
    "schedulers that call the model twice a step (Heun)",
    "refused",
)
def test_two_calls_per_step_are_refused_with_the_remedy() -> None:
    tiny = tiny_dit()
    compiled = planned(tiny)
    with torch.no_grad():
        compiled(**tiny.call(0, 4))
        with pytest.raises(ConfigError, match=r"2 calls in a row[\s\S]*batch the guidance"):
            compiled(**tiny.call(0, 4))


@works_with(
    "Torch",
    "`torch.inference_mode`",
    "works",
    "exact",
)
def test_inference_mode_works() -> None:
    tiny = tiny_dit()
    plan = plan_for(tiny)
    compiled = planned(tiny, plan=plan)
    with torch.inference_mode():
        got = [compiled(**tiny.call(step, 4))[0] for step in range(STEPS)]
    assert largest_difference(got, expected(tiny, plan)) < 1e-5


@works_with(
    "Torch",
    "gradients",
    "refused",
    "inference only",
)
def test_gradients_are_refused() -> None:
    tiny = tiny_dit()
    with pytest.raises(ConfigError, match=r"inference only[\s\S]*torch.no_grad"):
        planned(tiny, dense=True)(**tiny.call(0, 4))


@works_with(
    "Copies and processes",
    "two models of one structure",
    "works",
    "one compilation, caches apart",
)
def test_two_models_that_share_a_graph_never_share_caches() -> None:
    first, second = tiny_dit(seed=0), tiny_dit(seed=1)
    options: dict[str, Any] = {**EAGER, "threshold": 0.2, "cfg_layout": CfgLayout.COND_FIRST}
    compiled = [
        torch.compile(tiny.model, backend="ditfastattn", fullgraph=True, options=options)
        for tiny in (first, second)
    ]
    alone = []
    for tiny, model in zip((first, second), compiled, strict=True):
        tiny.run(model)  # calibrates
        alone.append(tiny.run(model))
    together: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for step in range(STEPS):
            for index, tiny in enumerate((first, second)):
                together[index].append(compiled[index](**tiny.call(step, 4))[0])
    assert largest_difference(together[0], alone[0]) == 0.0
    assert largest_difference(together[1], alone[1]) == 0.0
    assert largest_difference(alone[0], alone[1]) > 1e-3


@works_with(
    "Threads and turns",
    "two threads",
    "works",
    "each with caches of its own",
)
def test_two_threads_never_share_caches() -> None:
    tiny = tiny_dit()
    plan = plan_for(tiny)
    compiled = planned(tiny, plan=plan)
    right = tiny.run(compiled)
    barrier = threading.Barrier(2)
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def generate(number: int) -> None:
        for step in range(STEPS):
            barrier.wait(timeout=60)
            call = tiny.call(step, 4)
            if number:
                call["hidden_states"] = call["hidden_states"] * 2
            with torch.no_grad():
                results[number].append(compiled(**call)[0])

    threads = [threading.Thread(target=generate, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert largest_difference(results[0], right) == 0.0
    assert largest_difference(results[1], right) > 1e-3


def test_caches_are_freed_after_their_last_reader() -> None:
    tiny = tiny_dit()
    rows = [(Strategy.FULL,) * 3, (Strategy.SHARE_STEP,) * 3, *[(Strategy.FULL,) * 3] * 4]
    plan = plan_for(tiny, rows)
    compiled = planned(tiny, plan=plan)
    tiny.run(compiled, steps=1)
    gc.collect()
    (report,) = [r for r in reports() if r.plan == plan]
    assert report.peak_cache_bytes == 3 * 4 * 16 * 16 * 4
    assert len(live_caches()) == 3
    with torch.no_grad():
        compiled(**tiny.call(1, 4))
    assert live_caches() == {}


@pytest.mark.parametrize("seed", [1, 2])
def test_the_predicted_peak_of_the_caches_is_the_measured_one(seed: int) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    plan = make_plan(tiny, mixed_strategies(sites, seed), feed_forwards=True)
    torch._dynamo.reset()
    tiny.run(planned(tiny, plan=plan))
    (report,) = [r for r in reports() if r.plan == plan]
    peaks = [branch.caches.peak for model in models() for branch in branches(model)]
    assert report.peak_cache_bytes > 0
    assert report.peak_cache_bytes in peaks


def test_what_is_computed_ahead_takes_the_memory_that_is_reported() -> None:
    tiny = TINY_MODELS["pixart"]()
    plan = uniform_plan(tiny, Strategy.SHARE_STEP)
    compiled = planned(tiny, plan=plan)
    with torch.no_grad():
        for step in (*range(STEPS), 0):  # a generation's values are dropped after its last step
            compiled(**tiny.call(step, 4))
    (report,) = [r for r in reports() if r.plan == plan]
    held = [branch.hoisted.values for model in models() for branch in branches(model)]
    assert report.ahead_bytes > 0
    assert report.ahead_bytes in [sum(v.nbytes for v in values.values()) for values in held]


def models() -> list[ModelState]:
    return [model for found in specializations._registry for model in found.models.here()]


def branches(model: ModelState) -> tuple[GuidanceBranch, ...]:
    return () if model.generation is None else model.generation.every_branch


def live_caches() -> dict[Slot, torch.Tensor]:
    found: dict[Slot, torch.Tensor] = {}
    for model in models():
        for branch in branches(model):
            found |= branch.caches._held
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plam": "x"}, r"unknown option[\s\S]*got: +plam[\s\S]*expected: +plan, dense"),
        ({"plan": 3}, "'plan'"),
        ({"plan": "/nowhere/plan.json"}, "cannot read the plan"),
        ({"threshold": -1}, "a number above 0"),
        ({"cfg_layout": "sideways"}, "none, cond-first, uncond-first"),
        ({"lowering": "magic"}, "inductor, eager"),
        ({"timestep": "t"}, r"no tensor argument for the timestep[\s\S]*hidden_states"),
    ],
)
def test_a_wrong_option_says_what_it_takes(options: dict[str, Any], message: str) -> None:
    tiny = tiny_dit()
    with pytest.raises(Exception, match=message) as caught:
        tiny.run(planned(tiny, **options), steps=1)
    own = re.search(r"(Config|File)Error", repr(caught.value))  # Dynamo names it in its own error
    assert own or isinstance(caught.value, ConfigError)


def test_a_model_without_attention_runs_dense_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = torch.nn.Linear(4, 4)
    compiled = torch.compile(model, backend="ditfastattn", options={**EAGER, "dense": True})
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert "no attention site was found" in caplog.text
