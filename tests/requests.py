"""Generations that pause after each call of the model, as a server runs several in turns."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ditfastattn import CfgLayout, Plan, Strategy, accelerate, load
from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.fingerprint import fingerprint
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.schema import Sampler
from ditfastattn.runtime.matching import input_shapes
from tests.export.helpers import export_once
from tests.helpers import captured_once, tiny_dit

BATCH = 4  # of a bundle's export, and of every request: two images, with guidance or without
SCHEDULE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
F, S = Strategy.FULL, Strategy.SHARE_STEP
ROWS = (F, S, F, S)
TIMESTEPS = (750.0, 500.0, 250.0, 0.0)
REPEATED = (0.0, 0.0, 0.0, 0.0)  # as those of a clean first frame, where each token has its own


# How the tiny DiT runs by a plan, and how guidance reaches it then.
KINDS = [("accelerated", "cond-first"), ("accelerated", "separate"), ("bundled", "cond-first")]


@dataclass(frozen=True)
class Request:
    """What one user asks for, and what the model is given as the timestep of each step."""

    seed: int
    label: int = 1
    layout: CfgLayout = CfgLayout.COND_FIRST
    timesteps: tuple[float, ...] = TIMESTEPS
    eta: float = 0.0  # how much noise a step adds

    def calls(self, model: Any) -> Generator[Tensor]:
        """Generate, and pause after each call of ``model`` with what it has returned."""
        scheduler: Any = DDIMScheduler(**SCHEDULE)
        scheduler.set_timesteps(len(self.timesteps))
        apart = self.layout.calls == 2
        generator = torch.Generator().manual_seed(self.seed)
        images = BATCH if apart else BATCH // 2
        latents = torch.randn((images, 4, 8, 8), generator=generator)
        classes = (torch.arange(images) + self.label) % 10
        halves = [classes, torch.full_like(classes, 10)]
        for given, timestep in zip(self.timesteps, scheduler.timesteps, strict=True):
            found: list[Tensor] = []
            for labels in halves if apart else [torch.cat(halves)]:
                rows = latents.repeat(len(labels) // images, 1, 1, 1)
                times = torch.full((len(rows),), int(given))
                with torch.no_grad():
                    call = {"timestep": times, "class_labels": labels, "return_dict": False}
                    found.append(model(rows, **call)[0])
                yield found[-1].clone()
            cond, uncond = torch.cat(found).chunk(2)
            output = uncond + 2.0 * (cond - uncond)
            noise = {"eta": self.eta, "generator": generator} if self.eta else {}
            latents = scheduler.step(output, timestep, latents, **noise).prev_sample

    def run(self, model: Any) -> list[Tensor]:
        """Return what ``model`` returns in a generation without a pause."""
        return list(self.calls(model))


@dataclass
class Served:
    """Hold what a request got from the model, and why it got no more, if it was refused."""

    outputs: list[Tensor]
    refused: ConfigError | None = None


def take_turns(
    requests: list[Generator[Tensor]], around: Callable[[int], Any] | None = None, calls: int = 1
) -> list[Served]:
    """Run ``requests`` in turns of some ``calls``; ``around`` makes what surrounds a turn."""
    found = [Served([]) for _ in requests]
    going = dict(enumerate(requests))
    while going:
        for number, request in list(going.items()):
            try:
                with around(number) if around else nullcontext():
                    for _ in range(calls):
                        found[number].outputs.append(next(request))
            except StopIteration:
                del going[number]
            except ConfigError as error:
                found[number].refused = error
                del going[number]
    return found


def uniform_plan(layout: CfgLayout, timesteps: tuple[float, ...] = TIMESTEPS) -> Plan:
    """Return a plan of ``ROWS`` at all sites of the tiny DiT."""
    found = captured_once(tiny_dit(), BATCH)
    return Plan(
        model=fingerprint(found.graph, found.every, found.static),
        inputs=input_shapes(found.graph),
        sampler=Sampler(steps=len(ROWS), timesteps=timesteps, cfg_layout=layout),
        sites=tuple(planned_site(site) for site in found.every),
        strategies=tuple((strategy,) * len(found.every) for strategy in ROWS),
        calibration=Calibration(method="manual"),
    )


class Holder:
    """Hold a transformer, as a pipeline without a scheduler of its own does."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer


def served_model(kind: str, plan: Plan, folder: Path) -> Any:
    """Return the tiny DiT run by ``plan``: accelerated, or a bundle made in ``folder``."""
    if kind == "bundled":
        export_once(tiny_dit(), plan, folder / "bundle")
        return load(folder / "bundle")
    torch._dynamo.reset()
    return accelerate(Holder(tiny_dit().model), plan, lowering="eager").transformer
