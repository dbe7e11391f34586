"""Observe a dense generation from outside: what the model is called with, what the sampler does.

Nothing of a pipeline is known but what it shows: which argument of the model holds the sampler's
latent, how guidance combines what the model returns, and how the sampler steps. So a search can go
on from any step, on its own, for any model and most samplers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.phases import (
    guided_layout,
    in_runs,
    phases_of,
)
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.pipeline.guided_steps import layouts_at_steps
from ditfastattn.runtime.pipeline.model_call import bound_arguments, output_of, with_output
from ditfastattn.runtime.pipeline.prompts import Prompt, as_images, generate
from ditfastattn.runtime.search.phases import describe_layouts
from ditfastattn.runtime.search.whole_steps.guided import CLOSE, Guidance, find_guidance, near
from ditfastattn.runtime.search.whole_steps.observed import (
    WHERE,
    ModelCall,
    Observed,
    SamplerStep,
    Step,
    UnobservableError,
)


def observe(
    pipeline: Any, prompt: Prompt, layout: CfgLayout, timestep: str = "timestep"
) -> Observed:
    """Generate ``prompt`` densely, and return what was observed.

    ``layout`` is that of guided steps; where guidance is on at some only, and it has one branch, it
    is observed. ``timestep`` names the model's argument.

    Raises:
        UnobservableError: the generation cannot be continued from outside; the reason is named.
    """
    calls: list[ModelCall] = []
    steps: list[tuple[int, SamplerStep]] = []
    before: list[Any] = []
    scheduler = pipeline.scheduler
    module = transformer_of(pipeline, WHERE)

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
    return _described(images, before, calls, steps, layout, timestep)


def observe_alike(pipeline: Any, prompt: Prompt, first: Observed, timestep: str) -> Observed:
    """Generate ``prompt`` densely, and return what was observed; it is guided as ``first`` was.

    Raises:
        UnobservableError: it is guided otherwise, or cannot be continued from outside.
    """
    found = observe(pipeline, prompt, first.layout, timestep)
    if found.layouts != first.layouts:
        raise UnobservableError(
            f"all prompts must be guided alike: {describe_layouts(first.layouts)}",
            describe_layouts(found.layouts),
        )
    return found


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
    timestep: str,
) -> Observed:
    if not steps:
        raise UnobservableError("the pipeline never calls step() of its scheduler", "no call")
    ends = [count for count, _ in steps]
    groups = [tuple(calls[first:end]) for first, end in pairwise((0, *ends))]
    layouts = _layouts(groups, layout, timestep)
    parts = [(group, made) for group, (_, made) in zip(groups, steps, strict=True)]
    doubled = all(
        here.batched and _is_doubled(group[0], made)
        for (group, made), here in zip(parts, layouts, strict=True)
    )
    if doubled:
        parts = [(group, _first_half(made)) for group, made in parts]
    names = [
        _latent_name(parts[at][0][0], parts[at][1], here)
        for at, here in enumerate(layouts)
        if at == 0 or here is not layouts[at - 1]
    ]
    if len(set(names)) > 1:
        raise UnobservableError("one argument must hold the latent", ", then ".join(names))
    found = tuple(
        Step(group, made, _scale(group[0], names[0], made), _guidance(group, made, here, index))
        for index, ((group, made), here) in enumerate(zip(parts, layouts, strict=True))
    )
    guided, phases = guided_layout(layouts), phases_of(layouts)
    return Observed(images, before[0], names[0], guided, found, doubled, phases)


def _layouts(
    groups: Sequence[Sequence[ModelCall]], layout: CfgLayout, timestep: str
) -> tuple[CfgLayout, ...]:
    """Return how guidance reaches the model at each step; ``groups`` are the steps' calls."""
    rows = [tuple(len(call.output) for call in group) for group in groups]
    if len(set(rows)) == 1 and len(rows[0]) == layout.calls:
        return (layout,) * len(rows)
    given = [[_tensors(call) for call in group] for group in groups]
    found = layouts_at_steps(rows, given, layout, timestep)
    if not found:
        described = [" and ".join(f"{count} row(s)" for count in each) or "none" for each in rows]
        raise UnobservableError(
            f"each step must call the model {layout.calls} time(s) with the same rows, but for "
            "guidance that is off at some, and the scheduler once after it",
            f"calls of the model before each call of the scheduler: {in_runs(described)}",
        )
    return found


def _tensors(call: ModelCall) -> dict[str, Tensor]:
    named = call.arguments.items()
    return {name: item for name, item in named if isinstance(item, Tensor) and item.dim()}


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
