"""Observe a dense generation from outside: what the model is called with, what the sampler does.

Nothing of a pipeline is known but what it shows: which argument of the model holds the sampler's
latent, how guidance combines what the model returns, and how the sampler steps. So a search can go
on from any step, on its own, for any model and most samplers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.phases import in_runs
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.pipeline.model_call import bound_arguments, output_of, with_output
from ditfastattn.runtime.pipeline.prompts import Prompt, as_images, generate
from ditfastattn.runtime.search.whole_steps.guided import CLOSE, Guidance, find_guidance, near

_WHERE = "calibrate(method='whole-steps')"


class UnobservableError(ConfigError):
    """Refuse a generation that cannot be continued from outside."""

    def __init__(self, expected: str, got: str) -> None:
        """Take what was expected of the generation, and what was seen."""
        self.reason = f"{expected}; seen: {got}"
        super().__init__(
            "whole steps cannot be searched in this pipeline",
            where=_WHERE,
            got=got,
            expected=expected,
            remedy="search sites instead: method='global'",
        )


@dataclass(frozen=True)
class ModelCall:
    """Hold one call of the model by argument name, and what it returned, and in which ``form``."""

    arguments: Mapping[str, Any]
    output: Tensor
    form: Any


@dataclass(frozen=True)
class SamplerStep:
    """Hold one call of the scheduler: what it was given and returned."""

    output: Tensor
    timestep: Any
    latent: Tensor
    keywords: Mapping[str, Any]
    noise_state: Tensor | None  # of the generator in ``keywords``, before the step
    returned: Tensor


@dataclass(frozen=True)
class Step:
    """Describe one step of the sampler, and its one or two calls of the model.

    Attributes:
        calls: in order.
        sampler: what the scheduler did.
        scale: from the sampler's latent to the model's.
        guidance: from the model's outputs to what the scheduler is given.
    """

    calls: tuple[ModelCall, ...]
    sampler: SamplerStep
    scale: float
    guidance: Guidance


@dataclass(frozen=True)
class Observed:
    """Hold one dense generation.

    Attributes:
        images: that the pipeline returned, ``[B, C, H, W]``.
        scheduler: a copy, as it was before the first step.
        latent: the name of the model's argument that holds the latent.
        layout: how guidance reaches the model.
        steps: in order.
        doubled: the sampler steps both halves of the batch, as one latent twice (DiT's pipeline).
    """

    images: Tensor
    scheduler: Any
    latent: str
    layout: CfgLayout
    steps: tuple[Step, ...]
    doubled: bool = False

    @cached_property
    def latents(self) -> list[Tensor]:
        """Return the sampler's latents before each step, and after the last."""
        return [*(s.sampler.latent for s in self.steps), self.steps[-1].sampler.returned]


def observe(pipeline: Any, prompt: Prompt, layout: CfgLayout) -> Observed:
    """Generate ``prompt`` densely, and return what was observed.

    Raises:
        UnobservableError: the generation cannot be continued from outside; the reason is named.
    """
    calls: list[ModelCall] = []
    steps: list[tuple[int, SamplerStep]] = []
    before: list[Any] = []
    scheduler = pipeline.scheduler
    module = transformer_of(pipeline, _WHERE)

    def called(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        arguments = bound_arguments(type(module), args, kwargs)
        kept = {name: _kept(item, name, calls) for name, item in arguments.items()}
        output = output_of(result).detach().clone()
        calls.append(ModelCall(kept, output, with_output(result, output)))

    def stepped(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not before:
            before.append(_snapshot(scheduler))
        signature = inspect.signature(step)
        given = dict(signature.bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        noise = given.get("generator")
        state = noise.get_state() if isinstance(noise, torch.Generator) else None
        result = step(*args, **kwargs)
        returned = result[0] if isinstance(result, tuple) else result.prev_sample
        output, timestep, latent = (given.pop(n) for n in ("model_output", "timestep", "sample"))
        made = SamplerStep(
            output.clone(), timestep, latent.clone(), given, state, returned.detach().clone()
        )
        steps.append((len(calls), made))
        return result

    handle = module.register_forward_hook(called, with_kwargs=True)
    scheduler.step = partial(stepped, scheduler.step)
    try:
        images = as_images(generate(pipeline, prompt))
    finally:
        handle.remove()
        del scheduler.step
    return _described(images, before, calls, steps, layout)


def _kept(item: Any, name: str, calls: list[ModelCall]) -> Any:
    """Return ``item``; where it is a tensor, what the last call had if that is equal, or a copy."""
    if not isinstance(item, Tensor):
        return item
    last = calls[-1].arguments.get(name) if calls else None
    same = isinstance(last, Tensor) and last.shape == item.shape and torch.equal(last, item)
    return last if same else item.detach().clone()


def _snapshot(scheduler: Any) -> Any:
    made = copy.copy(scheduler)
    vars(made).pop("step", None)  # the observer
    return copy.deepcopy(made)


def _described(
    images: Tensor,
    before: list[Any],
    calls: list[ModelCall],
    steps: list[tuple[int, SamplerStep]],
    layout: CfgLayout,
) -> Observed:
    if not steps:
        raise UnobservableError("the pipeline never calls step() of its scheduler", "no call")
    per_step = layout.calls
    numbers = [count for count, _ in steps]
    if numbers != [per_step * (index + 1) for index in range(len(steps))]:
        raise UnobservableError(
            f"each step must call the model {per_step} time(s), and the scheduler once after it",
            f"calls of the model before each call of the scheduler: {numbers}",
        )
    rows = [f"{len(call.output)} row(s)" for call in calls[::per_step]]
    if len(set(rows)) > 1:
        raise UnobservableError("the same rows at each step", f"guidance changes: {in_runs(rows)}")
    grouped = [
        (tuple(calls[per_step * index : per_step * (index + 1)]), made)
        for index, (_, made) in enumerate(steps)
    ]
    doubled = layout.batched and all(_is_doubled(calls[0], made) for calls, made in grouped)
    if doubled:
        grouped = [(calls, _first_half(made)) for calls, made in grouped]
    name = _latent_name(grouped[0][0][0], grouped[0][1], layout)
    found = tuple(
        Step(group, made, _scale(group[0], name, made), _guidance(group, made, layout, index))
        for index, (group, made) in enumerate(grouped)
    )
    return Observed(images, before[0], name, layout, found, doubled)


def _is_doubled(call: ModelCall, made: SamplerStep) -> bool:
    """Return whether the sampler steps the whole batch of the model, both halves alike."""
    if len(made.latent) != len(call.output):
        return False
    return all(torch.equal(*item.chunk(2)) for item in (made.latent, made.returned))


def _first_half(made: SamplerStep) -> SamplerStep:
    names = ("output", "latent", "returned")
    return replace(made, **{name: getattr(made, name).chunk(2)[0] for name in names})


def _latent_name(call: ModelCall, made: SamplerStep, layout: CfgLayout) -> str:
    """Return which argument holds the latent, scaled, once for each branch in the batch."""
    fitting = [
        name
        for name, item in call.arguments.items()
        if isinstance(item, Tensor) and _holds(item, made.latent, layout)
    ]
    if len(fitting) != 1:
        raise UnobservableError(
            "one argument of the model must be the scheduler's latent, times a number",
            ", ".join(fitting) or f"none of {', '.join(call.arguments)}",
        )
    return fitting[0]


def _holds(item: Tensor, latent: Tensor, layout: CfgLayout) -> bool:
    copies = 2 if layout.batched else 1
    if item.dim() != latent.dim() or len(item) != copies * len(latent):
        return False
    if not item.is_floating_point() or item.shape[2:] != latent.shape[2:]:
        return False
    if item.shape[1] < latent.shape[1]:
        return False
    wanted = latent.float() * _ratio(item, latent)
    halves = torch.split(item.float(), len(latent))
    return all(near(half[:, : latent.shape[1]], wanted, item.dtype) for half in halves)


def _ratio(item: Tensor, latent: Tensor) -> float:
    own = item[: len(latent), : latent.shape[1]].double()
    return float((own * latent.double()).sum() / latent.double().square().sum())


def _scale(call: ModelCall, name: str, made: SamplerStep) -> float:
    return _ratio(call.arguments[name], made.latent)


def _guidance(
    calls: tuple[ModelCall, ...], made: SamplerStep, layout: CfgLayout, step: int
) -> Guidance:
    """Return how the branches' outputs become what the scheduler is given."""
    parts = branches([call.output for call in calls], layout, made.latent)
    if parts[0].numel() != made.output.numel():
        raise UnobservableError(
            "the scheduler must be given what the model returns, branches weighted and added",
            f"{list(made.output.shape)} of {list(calls[0].output.shape)} at step {step}",
        )
    found = find_guidance(parts, made.output, layout)
    if found is None:
        raise UnobservableError(
            "the scheduler must be given a weighted sum of what the model returns, as it is or "
            "brought to the norm of the conditional output",
            f"something else at step {step}",
        )
    if abs(sum(found.weights)) < CLOSE:
        raise UnobservableError(
            "the weights of the branches must not cancel", f"{found.weights} at step {step}"
        )
    return found


def branches(outputs: list[Tensor], layout: CfgLayout, latent: Tensor) -> list[Tensor]:
    """Return the output of each guidance branch, in order, with the channels of ``latent``."""
    halves = outputs[0].chunk(2) if layout.batched else outputs
    return [half[:, : latent.shape[1]] if half.dim() > 3 else half for half in halves]
