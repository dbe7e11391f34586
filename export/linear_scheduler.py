"""Find what a scheduler does to latents, as numbers: a recurrence that any runtime can compute.

DDIM, DPM-Solver++, Euler, flow matching and their like are linear in the noise, the model's outputs
and, where they clip their estimate of the image, in the clipped estimate. Run on basis vectors
instead of images, a scheduler reveals its coefficients; its formulas are not repeated here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.bundle.stepping import Clip, LinearSchedule, LinearStep, Stepper, Terms

WITHOUT_LOOP = "export without a loop: the pipeline's own scheduler then steps the bundle"
_HISTORY = 4  # of earlier latents, outputs and clipped estimates that a multistep solver may use
_TOLERANCE = 1e-5  # relative: schedulers' tables are fp32


def linear_schedule(scheduler: Any) -> LinearSchedule:
    """Return what ``scheduler`` computes in the timesteps that it is set to.

    Raises:
        ConfigError: it draws noise, clips depending on the images, or is otherwise not linear.
    """
    count = len(scheduler.timesteps)
    # One direction for the noise, one for the output of each step, one for what each step clips.
    basis = torch.eye(1 + 2 * count, dtype=torch.float64)
    probe = _Probe(basis[1 + count :])
    run = _run(copy.deepcopy(scheduler), basis[: 1 + count], probe)
    outputs, clipped = list(basis[1 : 1 + count]), list(probe.clipped)
    steps = []
    for step in range(count):
        present = run.latents[: step + 1], outputs[: step + 1]
        latent, output, estimate = _terms(run.latents[step + 1], (*present, clipped[: step + 1]))
        how = LinearStep(
            timestep=run.timesteps[step],
            input_scale=run.scales[step],
            latents=latent,
            outputs=output,
            clipped=estimate,
            clip=_clip(probe.clips[step], (*present, clipped[:step]))
            if step in probe.clips
            else None,
        )
        steps.append(how)
    schedule = LinearSchedule(noise_scale=float(run.latents[0][0]), steps=tuple(steps))
    _check(scheduler, schedule)
    return schedule


def _clip(found: tuple[Tensor, float, float], bases: tuple[Sequence[Tensor], ...]) -> Clip:
    argument, low, high = found
    latents, outputs, _ = _terms(argument, bases)
    return Clip(latents=latents, outputs=outputs, low=low, high=high)


class _Probe(TorchFunctionMode):
    """Make a step's clipping return a basis vector of its own, and record what it clipped."""

    def __init__(self, clipped: Tensor) -> None:
        super().__init__()
        self.clipped = clipped
        self.clips: dict[int, tuple[Tensor, float, float]] = {}
        self.step = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = dict(zip(("input", "min", "max"), args, strict=False)) | (kwargs or {})
        size = self.clipped.shape[-1]
        clips = func in (torch.clamp, Tensor.clamp) and named["input"].numel() == size
        if not clips or self.step in self.clips:
            return func(*args, **(kwargs or {}))
        low, high = (float(torch.as_tensor(named[name]).flatten()[0]) for name in ("min", "max"))
        self.clips[self.step] = named["input"].flatten().double(), low, high
        return self.clipped[self.step].reshape(named["input"].shape)


@dataclass(frozen=True)
class _Run:
    latents: list[Tensor]
    scales: list[float]
    timesteps: list[float]


def _run(scheduler: Any, content: Tensor, probe: _Probe | None = None) -> _Run:
    """Step from ``content[0]`` as the noise, with ``content[1 + t]`` as the output of step t."""
    sample = content[0] * float(getattr(scheduler, "init_noise_sigma", 1.0))
    run = _Run([sample], [], [])
    for t, timestep in enumerate(scheduler.timesteps):
        run.scales.append(_input_scale(scheduler, timestep))
        run.timesteps.append(float(timestep))
        # As an image of one channel: schedulers reshape what they get.
        image, output = sample.reshape(1, 1, 1, -1), content[1 + t].reshape(1, 1, 1, -1)
        if probe is not None:
            probe.step = t
        with probe or nullcontext():
            made = scheduler.step(output, timestep, image, return_dict=False)[0]
        sample = made.reshape(-1).double()
        run.latents.append(sample)
    return run


def _input_scale(scheduler: Any, timestep: Any) -> float:
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    return float(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), timestep)[0])


def _check(scheduler: Any, schedule: LinearSchedule) -> None:
    """Compare with a run on large random numbers, which reveals what the recurrence misses."""
    generator = torch.Generator().manual_seed(0)
    count = len(schedule.steps)
    content = 3 * torch.randn(count + 1, 16, generator=generator, dtype=torch.float64)
    wanted = _run(copy.deepcopy(scheduler), content).latents[-1]
    got = follow(schedule, content[0], list(content[1:]))[-1]
    error = float((got - wanted).abs().max() / wanted.abs().max())
    if not error < 1e-4:
        raise ConfigError(
            "the scheduler is not linear: it draws noise, or thresholds depending on the images",
            where=type(scheduler).__name__,
            got=f"a relative error of {error:.1e} as a linear recurrence",
            remedy="export without the loop, and let the pipeline's scheduler step",
        )


def follow(schedule: LinearSchedule, noise: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the latents before the first step and after each, given the guided outputs."""
    stepper = Stepper(schedule, noise)
    for output in outputs:
        stepper.step(output)
    return stepper.latents


_AllTerms = tuple[Terms, Terms, Terms]  # of latents, outputs and clipped estimates


def _terms(wanted: Tensor, bases: tuple[Sequence[Tensor], ...]) -> _AllTerms:
    """Return ``wanted`` as a sum of as few latents, outputs and clipped estimates as suffice."""
    whole = max(map(len, bases))
    for depth in range(1, min(_HISTORY, whole) + 1):
        terms, error = _fit(wanted, bases, depth)
        if error < _TOLERANCE * float(wanted.abs().max()):
            return terms
    return _fit(wanted, bases, whole)[0]


def _fit(
    wanted: Tensor, bases: tuple[Sequence[Tensor], ...], depth: int
) -> tuple[_AllTerms, float]:
    lasts = [list(basis)[::-1][:depth] for basis in bases]
    matrix = torch.stack([column for last in lasts for column in last], dim=1)
    solved = torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0]
    latents, outputs, clipped = map(_listed, solved.split([len(last) for last in lasts]))
    return (latents, outputs, clipped), float((matrix @ solved - wanted).abs().max())


def _listed(factors: Tensor) -> Terms:
    return tuple((ago, float(factor)) for ago, factor in enumerate(factors) if abs(factor) > 1e-12)
