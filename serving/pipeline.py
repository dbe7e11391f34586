"""Generate images for requests with a diffusers pipeline, one batch in each lane."""

from __future__ import annotations

import functools
import inspect
import io
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.accelerate import chosen_plan
from ditfastattn.runtime.current_generation import generation
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.pipeline.forwards import is_planned
from ditfastattn.runtime.plan_choice import Choice
from ditfastattn.runtime.quality import quality
from ditfastattn.serving.job import Job, Made, StoppedError
from ditfastattn.serving.lanes import Lane
from ditfastattn.serving.turns import Turn

BUNDLED = "bundled"  # the tier of a server whose transformer is a bundle


class NotFiniteError(RuntimeError):
    """Report latents or images with NaN or infinities, which are not served."""


@dataclass(frozen=True)
class Taken:
    """What the pipeline takes, and its defaults.

    Attributes:
        condition: ``prompt``, or ``class_labels`` of a class-conditional model.
        names: the arguments of its call.
        labels: the classes by name, where the model names them.
        classes: how many classes there are; 0 for prompts.
        height: of the images by default; 0 where the pipeline does not say.
        width: as the height.
        steps: the number by default.
        call: further arguments, of all requests.
    """

    condition: str
    names: frozenset[str]
    labels: dict[str, int]
    classes: int
    height: int
    width: int
    steps: int
    call: Mapping[str, Any]


_REQUESTED = frozenset(  # what requests say, and what the server does with images
    {
        "callback_on_step_end",
        "generator",
        "guidance_scale",
        "height",
        "negative_prompt",
        "num_images_per_prompt",
        "num_inference_steps",
        "output_type",
        "return_dict",
        "width",
    }
)


def taken_by(pipeline: Any, call: Mapping[str, Any]) -> Taken:
    """Return what ``pipeline`` takes, beside the arguments of ``call``, which are of all requests.

    Raises:
        ConfigError: it does not make images of prompts or classes, or does not take ``call``.
    """
    known = inspect.signature(pipeline.__call__).parameters
    condition = next((name for name in ("prompt", "class_labels") if name in known), "")
    if not condition or "num_frames" in known or "num_inference_steps" not in known:
        raise ConfigError(
            "the server makes images of prompts or classes, which this pipeline does not",
            where="serve(pipeline)",
            got=f"{type(pipeline).__name__}({', '.join(known)})",
            expected="arguments prompt or class_labels, and num_inference_steps; no frames",
        )
    if wrong := sorted(name for name in call if name not in known or name in _REQUESTED):
        raise ConfigError(
            "these arguments are not of all requests, or not the pipeline's",
            where="serve(call)",
            got=", ".join(wrong),
            expected=", ".join(sorted(set(known) - _REQUESTED - {condition})),
        )
    needed = [
        name
        for name, each in known.items()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    if missing := set(needed) - {condition, *call}:
        raise ConfigError(
            "the pipeline needs more than a request says",
            where="serve(pipeline)",
            got=", ".join(sorted(missing)),
            expected=condition,
        )
    config: Any = transformer_of(pipeline, "serve(pipeline)").config
    scale = getattr(pipeline, "vae_scale_factor", 1)
    side = getattr(pipeline, "default_sample_size", None) or getattr(config, "sample_size", 0)
    side = side * scale if isinstance(side, int) else 0
    return Taken(
        condition=condition,
        names=frozenset(known),
        labels=dict(getattr(pipeline, "labels", None) or {}),
        classes=config.num_embeds_ada_norm if condition == "class_labels" else 0,
        height=side,
        width=side,
        steps=int(known["num_inference_steps"].default),
        call=dict(call),
    )


def generate(lane: Lane, taken: Taken, jobs: Sequence[Job], tier: str = "") -> list[Made]:
    """Return the images of ``jobs``, which are of one kind, in one generation.

    It runs by a plan of ``tier``, or of the tier that they ask for. It computes in its turn alone,
    which it hands on after each step.

    Raises:
        StoppedError: nobody waits for any of them any more; the generation has ended there.
        NotFiniteError: an image is not one.
        ConfigError: no plan is for them, and that is an error.
    """
    began, kind = time.monotonic(), jobs[0].wanted.kind
    tier = tier or kind.tier
    call: dict[str, Any] = {
        **taken.call,
        taken.condition: [job.wanted.condition for job in jobs],
        "num_inference_steps": kind.steps,
        "generator": [torch.Generator().manual_seed(job.wanted.seed) for job in jobs],
    }
    if kind.guidance is not None:
        call["guidance_scale"] = kind.guidance
    if kind.height and "height" in taken.names:
        call |= {"height": kind.height, "width": kind.width}
    if any(job.wanted.negative for job in jobs):
        call["negative_prompt"] = [job.wanted.negative for job in jobs]
    for name, value in (("output_type", "pt"), ("return_dict", False)):
        if name in taken.names:
            call[name] = value
    for job in jobs:
        job.began = began
    pipeline = lane.pipeline
    turn_of_jobs = lane.turns.turn(lambda: all(job.given_up() for job in jobs))
    # The caches are the context's, and go with it, however the generation ends.
    with turn_of_jobs as turn, generation(), quality(_asked(tier)), torch.no_grad():
        try:
            with lane.kept_processors() as check, _watched_steps(lane, turn, jobs, check):
                images = _pictures(pipeline(**call))
        except BaseException:
            free = getattr(pipeline, "maybe_free_model_hooks", None)
            if free is not None:
                free()
            raise
        choice = _choice(pipeline, tier)
    if not bool(torch.isfinite(images).all()):  # they are on the CPU
        raise NotFiniteError(f"an image has values that are not finite ({choice})")
    if len(images) != len(jobs):
        raise RuntimeError(f"the pipeline made {len(images)} images of {len(jobs)}")
    seconds = time.monotonic() - began
    return [
        Made(_png(image), job.wanted.seed, choice, seconds, len(jobs))
        for image, job in zip(images, jobs, strict=True)
    ]


def _asked(tier: str) -> str:
    return "" if tier == BUNDLED else tier


def _choice(pipeline: Any, tier: str) -> Choice:
    if tier == BUNDLED or not is_planned(transformer_of(pipeline, "serve(pipeline)")):
        return Choice(tier)
    return chosen_plan(pipeline)


@contextmanager
def _watched_steps(
    lane: Lane, turn: Turn, jobs: Sequence[Job], check: Callable[[], None]
) -> Generator[None]:
    """End the generation after a step when nobody waits for it; refuse what is not finite.

    After each step that goes on, the turn is handed on; before that of the first one, ``check``.

    Every pipeline calls its scheduler once a step; callbacks are not offered by all. All that
    caches hold has gone into the model's output, and a sampler may clip an infinity, so outputs
    and latents are looked at. What was found is read at the end: no step waits for the device.
    """
    scheduler = lane.pipeline.scheduler
    own, before = scheduler.step, vars(scheduler).get("step")
    found: list[list[Tensor]] = []

    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        output = args[0] if args else kwargs["model_output"]
        latents = result[0] if isinstance(result, tuple) else result.prev_sample
        found.append([torch.isfinite(each).all() for each in (output, latents)])
        waiting = [job for job in jobs if not job.given_up()]
        if not waiting:
            raise StoppedError
        for job in waiting:
            job.on_step(len(found), len(scheduler.timesteps))
        if len(found) == 1:
            check()
        turn.hand_on()
        return result

    scheduler.step = step
    try:
        yield
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before
    broken = [number for number, finite in enumerate(found) if not all(finite)]
    if broken:
        raise NotFiniteError(f"values of step {broken[0]} of {len(found)} are not finite")


def _pictures(result: Any) -> Tensor:
    """Return what a pipeline has returned as ``[B, C, H, W]`` in [0, 1]."""
    images = result[0] if isinstance(result, tuple) else result.images
    found = images if isinstance(images, Tensor) else torch.as_tensor(images).movedim(-1, 1)
    if found.dim() != 4:
        raise ConfigError(
            "the pipeline returned no images", where="serve(pipeline)", got=list(found.shape)
        )
    return found.float().cpu()


def _png(image: Tensor) -> bytes:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
