"""Videos from a first frame: it is never noisy, so its tokens may be at timestep 0 throughout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import (
    CogVideoXImageToVideoPipeline,
)
from diffusers.pipelines.ltx.pipeline_ltx_image2video import LTXImageToVideoPipeline
from diffusers.pipelines.wan import pipeline_wan_i2v
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline

from ditfastattn import ConfigError, Target, accelerate, calibrate, restore
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.exercises import exercises
from tests.helpers import randomize
from tests.plans import mixed_plan_for
from tests.runtime.test_cancelled import Cancelled
from tests.tiers import slow_but
from tests.tiny_pipelines import TINY_PIPELINES
from tests.works_with import works_with

STEPS = 4
FRAME = torch.linspace(0.0, 1.0, 3 * 32 * 32).reshape(1, 3, 32, 32)


def from_parts(kind: Any, text: str, channels: int = 0, **options: Any) -> Any:
    """Return a pipeline of ``kind`` of the parts of one that takes ``text`` alone.

    The condition takes further ``channels`` of the transformer's input.
    """
    parts = dict(TINY_PIPELINES[text][0]().components)
    own = parts["transformer"]
    if channels:
        parts["transformer"] = randomize(
            type(own).from_config({**own.config, "in_channels": own.config.in_channels + channels})
        )
    made = kind(**parts, **options)
    made.set_progress_bar_config(disable=True)
    return made


#: how a pipeline is made, and whose call it takes; "tokens" have timesteps of their own
PIPELINES: dict[str, tuple[Callable[[], Any], str]] = {
    "ltx-tokens": (partial(from_parts, LTXImageToVideoPipeline, "ltx"), "ltx"),
    "wan-tokens": (
        partial(from_parts, WanImageToVideoPipeline, "wan", expand_timesteps=True),
        "wan",
    ),
    "wan": (partial(from_parts, WanImageToVideoPipeline, "wan", 8), "wan"),
    "cogvideox": (partial(from_parts, CogVideoXImageToVideoPipeline, "cogvideox", 4), "cogvideox"),
}


def made(name: str) -> tuple[Any, dict[str, Any]]:
    torch._dynamo.reset()
    build, text = PIPELINES[name]
    return build(), {**TINY_PIPELINES[text][1], "num_inference_steps": STEPS, "image": FRAME}


def cancelled_after(pipeline: Any, prompt: Prompt, calls: int) -> None:
    """End a generation as its transformer has returned for the last of some ``calls``."""
    left = [None] * (calls - 1)

    def end(*_: Any) -> None:
        if not left:
            raise Cancelled
        left.pop()

    hook = pipeline.transformer.register_forward_hook(end)
    with pytest.raises(Cancelled):
        generate(pipeline, prompt)
    hook.remove()


@exercises("img2img", *{text for _, text in PIPELINES.values()})
@works_with(
    "Pipelines",
    "image-to-video whose first frame is given (LTX, Wan 2.1 and 2.2, CogVideoX)",
    "works",
    "also where its tokens are at timestep 0 throughout; whole steps of Wan 2.1 alone",
)
@pytest.mark.parametrize("name", slow_but({"ltx-tokens"}, PIPELINES))
def test_a_mixed_plan_gives_the_interpreters_videos_also_after_a_cancelled_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wan calls its transformer twice a step: one call is between a step's two."""
    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", str.strip)  # it wants ftfy
    pipeline, call = made(name)
    mixed = mixed_plan_for(pipeline, call)
    assert mixed.plan.sampler.steps == STEPS
    assert len(set(mixed.plan.sampler.timesteps)) == STEPS
    dense = generate(pipeline, Prompt(call, 5))
    expected = mixed.interpret(pipeline, Prompt(call, 5))
    assert float((expected - dense).abs().max()) > 1e-3
    accelerate(pipeline, mixed.plan, lowering="eager")
    other = {**call, "prompt": "a dog runs"}
    for seed, arguments, calls in product((6, 5), (call, other), (1, 2, 3)):
        cancelled_after(pipeline, Prompt(arguments, seed), calls)
        found = generate(pipeline, Prompt(call, 5))
        assert float((found - expected).abs().max()) < 1e-5, f"{seed}, {arguments}, {calls}"
    restore(pipeline)


@pytest.mark.parametrize("name", slow_but({"ltx-tokens"}, PIPELINES))
def test_whole_steps_are_found_or_refused_as_the_latent_shows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wan 2.1 takes the frame as further channels; the others put it among the latent's."""
    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", str.strip)
    pipeline, call = made(name)
    search = partial(calibrate, pipeline, call, target=Target.min_psnr(20.0), method="whole-steps")
    if name == "wan":
        assert search().sampler.steps == STEPS
        return
    with pytest.raises(ConfigError, match=r"must be the scheduler's latent[\s\S]*global") as raised:
        search()
    assert "prompt" not in str(raised.value)


@pytest.mark.slow  # by default a stand-in does: see test_calls_of_a_generation.py
@pytest.mark.parametrize("name", ["ltx-tokens", "cogvideox"])
def test_plans_of_sites_are_found(name: str) -> None:
    pipeline, call = made(name)
    assert calibrate(pipeline, call, target=Target.threshold(0.2)).sampler.steps == STEPS
    accelerate(pipeline, lowering="eager", threshold=0.2)  # calibrates itself
    first, *others = (generate(pipeline, Prompt(call, 5)) for _ in range(3))
    assert all(float((other - first).abs().max()) < 1e-5 for other in others)
    restore(pipeline)
