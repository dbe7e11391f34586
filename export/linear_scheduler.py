"""Find what a scheduler does to latents, as numbers: a recurrence that any runtime can compute.

DDIM, DPM-Solver++, Euler, flow matching and their like are linear in the noise and the model's
outputs. Run on basis vectors in place of images, a scheduler says its own coefficients; nothing of
its formulas is written down here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditfastattn.errors import ConfigError

_HISTORY = 4  # of earlier latents and outputs that a multistep solver may use
_TOLERANCE = 1e-5  # relative: schedulers' tables are fp32


@dataclass(frozen=True)
class LinearStep:
    """Say how one step makes the next latents: the sum of what is listed, times its factor.

    Attributes:
        timestep: what the model is called with, before the pipeline changes it.
        input_scale: what the latents are multiplied with for the model.
        latents: pairs (how many steps ago, factor); 0 is the present latents.
        outputs: the same of the model's outputs.
    """

    timestep: float
    input_scale: float
    latents: tuple[tuple[int, float], ...]
    outputs: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class LinearSchedule:
    """Hold the steps, and what turns standard normal noise into the first latents."""

    noise_scale: float
    steps: tuple[LinearStep, ...]


def linear_schedule(scheduler: Any, count: int) -> LinearSchedule:
    """Return what ``scheduler`` does in ``count`` steps.

    Raises:
        ConfigError: it draws noise, clips, or is otherwise not linear.
    """
    probe = copy.deepcopy(scheduler)
    latents, scales, timesteps = _run(probe, count, torch.eye(count + 1, dtype=torch.float64))
    _check_linear(scheduler, count, latents[-1])
    basis = torch.eye(count + 1, dtype=torch.float64)[1:]  # row t: the model's output at step t
    steps = tuple(
        LinearStep(timesteps[t], scales[t], *_recurrence(latents, basis, t)) for t in range(count)
    )
    return LinearSchedule(float(latents[0][0]), steps)


def _run(
    scheduler: Any, count: int, content: Tensor
) -> tuple[list[Tensor], list[float], list[float]]:
    """Step from ``content[0]`` as the noise, with ``content[1 + t]`` as the output of step t."""
    scheduler.set_timesteps(count)
    sample = content[0] * float(scheduler.init_noise_sigma if _scales_noise(scheduler) else 1.0)
    latents, scales, timesteps = [sample], list[float](), list[float]()
    for t, timestep in enumerate(scheduler.timesteps):
        scales.append(_input_scale(scheduler, timestep))
        timesteps.append(float(timestep))
        # As an image of one channel: schedulers reshape what they get.
        image, output = sample.reshape(1, 1, 1, -1), content[1 + t].reshape(1, 1, 1, -1)
        sample = scheduler.step(output, timestep, image, return_dict=False)[0].reshape(-1).double()
        latents.append(sample)
    if len(timesteps) != count:
        raise ConfigError(
            "the scheduler calls the model more than once a step",
            where=type(scheduler).__name__,
            got=f"{len(timesteps)} calls in {count} steps",
        )
    return latents, scales, timesteps


def _scales_noise(scheduler: Any) -> bool:
    return hasattr(scheduler, "init_noise_sigma")


def _input_scale(scheduler: Any, timestep: Any) -> float:
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    return float(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), timestep)[0])


def _check_linear(scheduler: Any, count: int, coefficients: Tensor) -> None:
    """Compare with a run on large random numbers: clipping and drawn noise show."""
    generator = torch.Generator().manual_seed(0)
    content = 3 * torch.randn(count + 1, 16, generator=generator, dtype=torch.float64)
    wanted = coefficients @ content
    got = _run(copy.deepcopy(scheduler), count, content)[0][-1]
    error = float((got - wanted).abs().max() / wanted.abs().max())
    if error > 1e-4:
        raise ConfigError(
            "the scheduler is not linear: it clips, thresholds or draws noise",
            where=type(scheduler).__name__,
            got=f"a relative error of {error:.1e} as a linear recurrence",
            remedy="export without the loop, and let the pipeline's scheduler step",
        )


def _recurrence(
    latents: list[Tensor], basis: Tensor, step: int
) -> tuple[tuple[tuple[int, float], ...], tuple[tuple[int, float], ...]]:
    """Write the next latents as few earlier latents and outputs as suffice."""
    wanted = latents[step + 1]
    for depth in range(1, min(_HISTORY, step + 1) + 1):
        columns = [latents[step - ago] for ago in range(depth)]
        columns += [basis[step - ago] for ago in range(depth)]
        matrix = torch.stack(columns, dim=1)
        solved = torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0]
        if float((matrix @ solved - wanted).abs().max()) < _TOLERANCE * float(wanted.abs().max()):
            return _listed(solved[:depth]), _listed(solved[depth:])
    # Else in full: the noise and every output so far.
    ago = range(step + 1)
    scale = float(wanted[0] / latents[0][0])
    return ((step, scale),), tuple((a, float(wanted[1 + step - a])) for a in ago)


def _listed(factors: Tensor) -> tuple[tuple[int, float], ...]:
    return tuple((ago, float(factor)) for ago, factor in enumerate(factors) if abs(factor) > 1e-12)
