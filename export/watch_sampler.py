"""Watch what a pipeline's sampler does in a whole generation, without running the model in it.

The transformer answers with random numbers, so that a generation costs one call of it. What is
found to be true of such numbers (guidance, the scheduler's sums, the timesteps) is true of images.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.capture_call import RecordedCall
from ditfastattn.export.linear_scheduler import WITHOUT_LOOP, linear_schedule
from ditfastattn.export.watched_phases import expected_arguments
from ditfastattn.passes.plan.schema import Plan, Sampler
from ditfastattn.runtime.bundle.stepping import (
    LinearSchedule,
    Stepper,
    Stepping,
    first_noise,
    guided,
)
from ditfastattn.runtime.call_order import calls_in_order
from ditfastattn.runtime.clock import read_timestep, tolerances
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.pipeline.forwards import check_not_accelerated, replace_forward
from ditfastattn.runtime.pipeline.prompts import Prompt, generate

# The largest error of latents, relative to the largest one: pipelines keep them in these dtypes.
_ALLOWED: Final = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_WHERE: Final = "export(pipeline)"


class _Watched(Exception):  # noqa: N818  # it ends a generation and reports no error
    """End a generation once its last latents are known: nobody looks at the image."""


@dataclass
class WatchedGeneration:
    """Hold the calls of the transformer, what answered them, and the scheduler at the first one.

    ``latents`` are the last ones, if the scheduler has made them.
    """

    scheduler: Any = None
    calls: list[Mapping[str, Any]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    latents: Tensor | None = None

    def keep(self, arguments: Mapping[str, Any]) -> None:
        """Keep the arguments of a call; what is as in the first or last ones is kept once."""
        kept = {}
        for name, item in arguments.items():
            like = (*self.calls[:2], *self.calls[-2:])
            known = (call[name] for call in like if name in call)
            same = [each for each in known if _same(item, each)]
            kept[name] = same[0] if same else _copied(item)
        self.calls.append(kept)


def watch_sampler(pipeline: Any, prompt: Prompt, whole: bool = True) -> WatchedGeneration:
    """Generate with ``pipeline``, whose transformer answers at random; return what it was asked.

    Unless ``whole``, the generation ends at the first call.

    Raises:
        ConfigError: the pipeline does not call its transformer.
    """
    transformer = transformer_of(pipeline, _WHERE)
    check_not_accelerated(transformer)
    names = inspect.signature(transformer.forward)
    found = WatchedGeneration()
    generator = torch.Generator().manual_seed(0)
    answers: dict[int, Any] = {}  # by rows, which guidance changes

    def answering(forward: Any) -> Any:
        def answer(*args: Any, **kwargs: Any) -> Any:
            given = names.bind(*args, **kwargs).arguments
            found.keep(given)
            if not whole:
                raise _Watched
            if not answers:
                found.scheduler = _as_set(pipeline.scheduler)
            rows = RecordedCall(given).batch
            if rows not in answers:
                answers[rows] = forward(*args, **kwargs)
            made = copy.deepcopy(answers[rows])
            for tensor in _tensors(made):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            found.outputs.append(_tensors(made)[0].double().cpu())
            return made

        return answer

    undo = replace_forward(transformer, answering)
    try:
        with _ending(getattr(pipeline, "scheduler", None), found):
            generate(pipeline, prompt)
    except _Watched:
        pass
    finally:
        undo()
    if not found.calls:
        raise ConfigError(
            "the pipeline did not call its transformer",
            where=_WHERE,
            remedy="give a call that makes at least one step",
        )
    return found


@contextmanager
def _ending(scheduler: Any, found: WatchedGeneration) -> Generator[None]:
    """End the generation once ``scheduler`` has stepped to the last latents."""
    step = getattr(scheduler, "step", None)
    if step is None or "step" in vars(scheduler):
        yield
        return
    count = 0

    @functools.wraps(step)
    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        result = step(*args, **kwargs)
        count += 1
        if count == len(scheduler.timesteps):
            found.latents = _tensors(result)[0].double().cpu()
            raise _Watched
        return result

    scheduler.step = counting
    try:
        yield
    finally:
        del scheduler.step


def _as_set(scheduler: Any) -> Any:
    """Return a copy of ``scheduler``, as the pipeline has set it, without what watches it."""
    copied = copy.copy(scheduler)
    vars(copied).pop("step", None)
    return copy.deepcopy(copied)


def _tensors(result: Any) -> list[Tensor]:
    items = result if isinstance(result, (tuple, list)) else vars(result).values()
    return [item for item in items if isinstance(item, Tensor)]


def find_stepping(watched: WatchedGeneration, plan: Plan, latent: str, timestep: str) -> Stepping:
    """Return what the sampler does between steps, in numbers that reproduce what was watched.

    Args:
        watched: a whole generation.
        plan: the plan that says which timesteps there are, and how guidance reaches the model.
        latent: the name of the argument that is denoised.
        timestep: the name of the timestep's.

    Raises:
        ConfigError: they do not reproduce it, or the scheduler is not linear.
    """
    sampler = plan.sampler
    if not latent:
        raise _not_linear("the model's latent was not found", "no argument is like its output")
    order, calls = calls_in_order(sampler.spans), len(watched.calls)
    if calls != len(order) or len(watched.scheduler.timesteps) != sampler.steps:
        raise _not_linear(
            "the pipeline makes another number of steps than the plan",
            f"{calls} calls, {len(watched.scheduler.timesteps)} timesteps",
            f"{sampler.steps} steps, {len(order)} calls in all",
        )
    _check_timesteps(watched, [sampler.timesteps[call.step] for call in order], timestep)
    _check_conditions(watched, sampler, {latent, timestep})
    inputs = [call[latent].double().cpu() for call in watched.calls]
    found = with_guidance(linear_schedule(watched.scheduler), plan, inputs[0], watched.outputs[0])
    allowed = _ALLOWED.get(watched.calls[0][latent].dtype, _ALLOWED[torch.float32])
    stepper = Stepper(found, first_noise(inputs[0], found, sampler.layouts[0]))
    images = len(stepper.latents[0])
    for step, layout in enumerate(sampler.layouts):
        given = torch.cat([stepper.model_input] * (2 if layout.batched else 1))
        here = [number for number, call in enumerate(order) if call.step == step]
        for number in here:
            _check_alike(given, inputs[number], allowed, f"the model's latents at step {step}")
        stepper.step(guided(torch.cat([watched.outputs[n] for n in here]), found, layout))
    if watched.latents is not None:
        last = watched.latents[:images]
        _check_alike(stepper.latents[-1], last, allowed, "the last latents")
    return found


def with_guidance(found: LinearSchedule, plan: Plan, latent: Tensor, output: Tensor) -> Stepping:
    """Return ``found`` with the plan's timesteps and guidance."""
    timesteps = zip(found.steps, plan.sampler.timesteps, strict=True)
    scale = plan.sampler.guidance_scale
    learned = output.dim() > 3 and output.shape[1] != latent.shape[1]
    return Stepping(
        noise_scale=found.noise_scale,
        steps=tuple(how.model_copy(update={"timestep": at}) for how, at in timesteps),
        guidance_scale=1.0 if scale is None else scale,
        channels=latent.shape[1] if learned else 0,
    )


def _check_timesteps(watched: WatchedGeneration, planned: Sequence[float], name: str) -> None:
    found = [read_timestep(torch.as_tensor(call[name])).value() for call in watched.calls]
    pairs = zip(found, planned, tolerances(planned), strict=True)
    if any(abs(got - wanted) > most for got, wanted, most in pairs):
        raise _not_linear(
            "the pipeline's timesteps differ from the plan's",
            ", ".join(f"{value:g}" for value in found[:6]),
            ", ".join(f"{value:g}" for value in planned[:6]),
        )


def _check_conditions(
    watched: WatchedGeneration, sampler: Sampler, varying: Collection[str]
) -> None:
    order = calls_in_order(sampler.spans)
    expected = expected_arguments(watched.calls, sampler)
    for at, call, wanted in zip(order, watched.calls, expected, strict=True):
        for name in {*call, *wanted[0]} - {*varying}:
            if not any(_same(call.get(name), each.get(name)) for each in wanted):
                raise _not_linear(
                    "the pipeline changes a condition between the steps",
                    f"argument {name!r} at step {at.step}",
                    "the conditions of the first guided step",
                )


def _check_alike(got: Tensor, wanted: Tensor, allowed: float, what: str) -> None:
    error = float("inf")
    if got.shape == wanted.shape:
        error = float((got - wanted).abs().max() / wanted.abs().max())
    if not error <= allowed:
        raise _not_linear(
            "guidance and scheduler do not compute what the pipeline does",
            f"a relative error of {error:.1e} of {what}",
            f"at most {allowed:g}",
        )


def _not_linear(problem: str, got: str, expected: str = "") -> ConfigError:
    return ConfigError(
        problem, where="the sampler as numbers", got=got, expected=expected, remedy=WITHOUT_LOOP
    )


def _same(item: Any, other: Any) -> bool:
    """Return whether two arguments are equal, by content."""
    if item is other:
        return True
    if isinstance(item, Tensor) and isinstance(other, Tensor):
        return item.shape == other.shape and torch.equal(item, other)
    if isinstance(item, Tensor) or isinstance(other, Tensor) or type(item) is not type(other):
        return False
    if isinstance(item, (tuple, list)):
        pairs = zip(item, other, strict=False)
        return len(item) == len(other) and all(itertools.starmap(_same, pairs))
    if isinstance(item, dict):
        return item.keys() == other.keys() and all(_same(item[key], other[key]) for key in item)
    return bool(item == other)


def _copied(item: Any) -> Any:
    """Return a copy of an argument: a pipeline may write to its tensors later."""
    if isinstance(item, Tensor):
        return item.clone()
    if isinstance(item, (tuple, list)):
        return type(item)(map(_copied, item))
    if isinstance(item, dict):
        return {key: _copied(part) for key, part in item.items()}
    return item
