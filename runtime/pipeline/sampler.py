"""Describe a pipeline's sampler (scheduler, steps, guidance), and compare it with a plan's."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.phases import Phase
from ditfastattn.passes.plan.schema import Plan, Sampler
from ditfastattn.runtime.matching import mismatch


def describe_sampler(
    scheduler: Any,
    timesteps: Sequence[float],
    guidance_scale: float | None,
    cfg_layout: CfgLayout,
    phases: Sequence[Phase] = (),
) -> Sampler:
    """Return what a plan records of a sampler whose generations have ``timesteps``."""
    return Sampler(
        scheduler=type(scheduler).__name__,
        config=scheduler_config(scheduler),
        steps=len(timesteps),
        timesteps=tuple(timesteps),
        guidance_scale=guidance_scale,
        cfg_layout=cfg_layout,
        phases=tuple(phases),
    )


@contextmanager
def counting_steps(pipeline: Any) -> Generator[Callable[[], int]]:
    """Count how often the pipeline's scheduler steps; yield what returns the count so far.

    It stays 0 where there is no scheduler, or where the pipeline does not call it.
    """
    scheduler: Any = getattr(pipeline, "scheduler", None)
    count = 0
    own = getattr(scheduler, "step", None)
    if own is None or "step" in vars(scheduler):
        yield lambda: 0
        return

    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return own(*args, **kwargs)

    scheduler.step = step
    try:
        yield lambda: count
    finally:
        del scheduler.step


def check_sampler(plan: Plan, scheduler: Any, guidance_scale: float | None = None) -> None:
    """Check that ``scheduler``, its configuration and the guidance are those of ``plan``.

    Args:
        plan: the plan.
        scheduler: a diffusers scheduler.
        guidance_scale: the guidance of the generation; not checked where None.

    Raises:
        ConfigError: one of them differs; the message names the field.
    """
    sampler = plan.sampler
    if not sampler.scheduler:
        return
    if type(scheduler).__name__ != sampler.scheduler:
        raise mismatch(
            "sampler.scheduler", type(scheduler).__name__, sampler.scheduler, what="sampler"
        )
    config = scheduler_config(scheduler)
    for name in sorted(set(config) | set(sampler.config)):
        got, expected = config.get(name), sampler.config.get(name)
        if got != expected:
            raise mismatch(f"sampler.config.{name}", got, expected, what="sampler")
    if guidance_scale is not None and guidance_scale != sampler.guidance_scale:
        raise mismatch(
            "sampler.guidance_scale", guidance_scale, sampler.guidance_scale, what="sampler"
        )


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's configuration as JSON would read it back, private entries left out."""
    public = {
        key: str(item) if isinstance(item, float) and not math.isfinite(item) else item
        for key, item in dict(scheduler.config).items()
        if not key.startswith("_")
    }
    config: dict[str, Any] = json.loads(json.dumps(public, default=str))
    return config


def check_steps(count: int) -> None:
    """Raise ``ConfigError`` for a generation of one step: it has nothing to reuse."""
    if count < 2:
        raise ConfigError(
            "a generation of one step has nothing to reuse",
            where="calibrate(call)",
            got=f"{count} step",
            expected="2 steps or more: a plan reuses what earlier steps have computed",
            remedy="give the call more steps, by num_inference_steps, sigmas or strength",
        )
