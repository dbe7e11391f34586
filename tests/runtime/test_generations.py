"""A generation is recognised as one: where it begins, how many steps it has, whose it is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditfastattn import CfgLayout, ConfigError, Plan, Strategy
from ditfastattn.passes.analysis.fingerprint import fingerprint
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.schema import Sampler
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
    tiny_dit,
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
        sites=tuple(planned_site(site) for site in found.every),
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


def generate(
    model: Any, tiny: TinyModel, timesteps: Sequence[float], seed: int = 0, **dtype: torch.dtype
) -> list[Tensor]:
    """Run a generation whose latents ``seed`` fixes; each is near the one before."""
    latents, results = noise(100 * seed, 1, 4, 8, 8), []
    for step, t in enumerate(timesteps):
        latents = latents + 0.3 * noise(100 * seed + step, 1, 4, 8, 8)
        call = call_at(tiny, t, 0, **dtype) | {"hidden_states": latents.repeat(BATCH, 1, 1, 1)}
        results.append(model(**call)[0])
    return results


def branch_call(tiny: TinyModel, timestep: float, image: int, branch: int) -> dict[str, Any]:
    """Return one of guidance's two calls: the same latents, conditions of its own."""
    made = call_at(tiny, timestep, image)
    for name in ("class_labels", "encoder_hidden_states", "pooled_projections"):
        if name in made:
            made[name] = made[name].flip(0) if branch else made[name]
    return made


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what ditfastattn has logged."""
    own = (record for record in caplog.records if record.name.startswith("ditfastattn"))
    return [record.getMessage() for record in own]


# Two calls a step ---------------------------------------------------------------------------------

TIMES = (900.0, 750.0, 600.0, 450.0)


@pytest.mark.parametrize("steps", [(C, S, F, S), (C, C, F, C)])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_guidance_may_be_shared_at_the_first_step(name: str, steps: Sequence[Strategy]) -> None:
    tiny = TINY_MODELS[name]()
    every = captured_once(tiny, BATCH).every
    plan = plan_of(tiny, steps, TIMES, CfgLayout.SEPARATE)
    calls = [(step, branch) for step in range(len(steps)) for branch in range(2)]
    interpreter = PlanInterpreter(tiny.model, plan.strategies, every, CfgLayout.SEPARATE)
    expected = []
    for step, branch in calls:
        with torch.no_grad(), interpreter.step(step, branch):
            call = branch_call(tiny, TIMES[step], step, branch)
            expected.append(tiny.model(**call)[0])
    model = Stepped(tiny, plan=plan)
    for _ in range(2):
        got = [model(**branch_call(tiny, TIMES[s], s, branch))[0] for s, branch in calls]
        assert largest_difference(got, expected) < 1e-5


# Self-calibration ---------------------------------------------------------------------------------

DESCENDING = (900.0, 750.0, 600.0, 450.0, 300.0)
ASCENDING = tuple(1 - t / 1000 for t in DESCENDING)


@pytest.mark.parametrize("timesteps", [DESCENDING, ASCENDING], ids=["descending", "ascending"])
def test_a_self_calibration_ends_with_its_generation(
    timesteps: Sequence[float], caplog: pytest.LogCaptureFixture
) -> None:
    tiny = tiny_dit()
    model = Stepped(tiny, threshold=0.2, cfg_layout=CfgLayout.COND_FIRST)
    with caplog.at_level(logging.WARNING, logger="ditfastattn"):
        first, second = (generate(model, tiny, timesteps) for _ in range(2))
    assert "calibrated: 5 steps" in said(caplog)[1]
    assert model.plan.sampler.timesteps == pytest.approx(timesteps)
    assert largest_difference(first, second) < 1e-5


def test_rounded_timesteps_that_collide_are_counted_as_steps() -> None:
    tiny = tiny_dit()
    model = Stepped(tiny, threshold=0.2, cfg_layout=CfgLayout.COND_FIRST)
    timesteps = (1000.0, 999.0, 996.0, 995.0, 900.0)  # 1000, 1000, 996, 996, 900 in bfloat16
    first, second = (generate(model, tiny, timesteps, dtype=torch.bfloat16) for _ in range(2))
    assert model.plan.sampler.timesteps == (1000.0, 1000.0, 996.0, 996.0, 900.0)
    assert largest_difference(first, second) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_calls_of_one_step_are_told_from_rounded_timesteps(dtype: torch.dtype) -> None:
    tiny = tiny_dit()
    model = Stepped(tiny, cfg_layout=CfgLayout.COND_FIRST)
    model(**call_at(tiny, 900.0, 1, dtype))
    with pytest.raises(ConfigError, match=r"2 calls in a row[\s\S]*batch the guidance"):
        model(**call_at(tiny, 900.0, 1, dtype))


def test_generations_of_one_step_are_refused_sooner_or_later() -> None:
    tiny = tiny_dit()
    model = Stepped(tiny, cfg_layout=CfgLayout.COND_FIRST)
    with pytest.raises(ConfigError, match=r"calls in a row[\s\S]*one step only"):
        generate(model, tiny, [900.0] * 20)


@pytest.mark.parametrize("timesteps", [DESCENDING, ASCENDING], ids=["descending", "ascending"])
def test_an_interrupted_self_calibration_is_forgotten(timesteps: Sequence[float]) -> None:
    tiny = tiny_dit()
    model = Stepped(tiny, threshold=0.2, cfg_layout=CfgLayout.COND_FIRST)
    generate(model, tiny, timesteps[:3])
    with pytest.raises(ConfigError, match=r"calibrates again"):
        generate(model, tiny, timesteps)
    first, second = (generate(model, tiny, timesteps) for _ in range(2))
    assert model.plan.sampler.timesteps == pytest.approx(timesteps)
    assert largest_difference(first, second) < 1e-5


def test_a_self_calibrated_plan_that_has_served_is_kept() -> None:
    tiny = tiny_dit()
    model = Stepped(tiny, threshold=0.2, cfg_layout=CfgLayout.COND_FIRST)
    first, _, _ = (generate(model, tiny, DESCENDING) for _ in range(3))
    with pytest.raises(ConfigError, match="timestep"):
        generate(model, tiny, (900.0, 600.0, 300.0))
    assert largest_difference(first, generate(model, tiny, DESCENDING)) < 1e-5


# The latents of guidance ------------------------------------------------------------------------


class Masked(nn.Module):
    """Take a mask of the latent's size before the latent."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_dit().model

    def forward(
        self, mask: Tensor, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor
    ) -> Any:
        masked = mask * hidden_states
        return self.inner(masked, timestep, class_labels=class_labels, return_dict=False)


class Packed(nn.Module):
    """Take the latent as a row of numbers, unlike the output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_dit().model

    def forward(self, packed: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        latent = packed.view(-1, 4, 8, 8)
        return self.inner(latent, timestep, class_labels=class_labels, return_dict=False)


def inner_call(step: int, batch: int) -> dict[str, Any]:
    call = call_at(tiny_dit(), TIMES[step], step)
    del call["return_dict"]
    return call


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("layout", [CfgLayout.COND_FIRST, CfgLayout.SEPARATE])
def test_different_images_are_refused_where_a_mask_comes_first(
    layout: CfgLayout, channels: int
) -> None:
    def call(step: int, batch: int) -> dict[str, Any]:
        return {"mask": torch.ones(batch, channels, 8, 8), **inner_call(step, batch)}

    tiny = TinyModel(Masked().eval(), call)
    model = Stepped(tiny, plan=plan_of(tiny, (F, C, C, C), TIMES, layout))
    first, second = call(0, BATCH), call(0, BATCH)
    second["hidden_states"] = noise(9, BATCH, 4, 8, 8)
    if layout is CfgLayout.SEPARATE:
        model(**first)
        model(**second)  # it may be the first call of another generation, and is computed in full
        with pytest.raises(ConfigError, match="unexpected timestep"):
            model(**call(1, BATCH))
        return
    with pytest.raises(ConfigError, match=r"hidden_states: the plan shares guidance"):
        model(**second)


def test_an_unknown_latent_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def call(step: int, batch: int) -> dict[str, Any]:
        given = inner_call(step, batch)
        return {"packed": given.pop("hidden_states").flatten(1), **given}

    tiny = TinyModel(Packed().eval(), call)
    sharing, plain = (plan_of(tiny, (F, s, s, s), TIMES) for s in (C, S))
    with caplog.at_level(logging.WARNING, logger="ditfastattn"):
        Stepped(tiny, plan=plain)(**call(0, BATCH))
        assert not said(caplog)
        Stepped(tiny, plan=sharing)(**call(0, BATCH))
    (message,) = said(caplog)
    assert "shares guidance" in message
    assert "(packed, timestep, class_labels) has the size of its output" in message
