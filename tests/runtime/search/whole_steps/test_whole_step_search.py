"""Plans of whole steps: searched in real pipelines, run captured and opaque alike."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

import ditfastattn
from ditfastattn import ConfigError, Plan, Strategy, Target
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.pipeline.prompts import Prompt, generate, split_prompts
from ditfastattn.runtime.search.whole_steps import calibrate as whole_steps
from ditfastattn.runtime.search.whole_steps.calibrate import Options, calibrate_whole_steps
from ditfastattn.runtime.search.whole_steps.masks import Begun, fit_mask
from ditfastattn.runtime.search.whole_steps.observe import observe
from ditfastattn.runtime.search.whole_steps.rollout import Rollout
from tests.exercises import exercises
from tests.helpers import tiny_digits_pipeline
from tests.plans import by_example
from tests.tiers import slow_but
from tests.tiny_pipelines import TINY_PIPELINES, tiny_unet_pipeline
from tests.works_with import works_with

STEPS = 6
SEED = 9
FAMILIES = [
    "pixart",
    *(
        pytest.param(n, marks=pytest.mark.slow)
        for n in ("dit", "sd3", "flux", "cogvideox", "ltx", "wan", "qwenimage")
    ),
]


def searched(pipeline: Any, call: dict[str, Any], opaque: bool) -> Plan:
    prompts, unseen = split_prompts(call, 0), split_prompts(call, 500)
    target = Target.min_speedup(1.5)
    return calibrate_whole_steps(pipeline, prompts, unseen, Options(target, opaque=opaque))


def accelerated(pipeline: Any, plan: Plan, prompt: Prompt) -> Tensor:
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    images: Tensor = generate(pipeline, prompt)
    assert torch.equal(generate(pipeline, prompt), images)
    ditfastattn.restore(pipeline)
    return images


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_opaque_and_plain_torch_agree(name: str) -> None:
    torch._dynamo.reset()
    make, given = TINY_PIPELINES[name]
    pipeline, call = make(), {"num_inference_steps": STEPS, **given}
    prompt = Prompt(call, SEED)
    captured, opaque = (searched(pipeline, call, opaque) for opaque in (False, True))
    assert captured.strategies == opaque.strategies
    assert sum(row == (Strategy.FULL,) for row in opaque.strategies) == STEPS / 1.5
    assert opaque.model.structure.startswith("module:")
    assert not captured.model.structure.startswith("module:")
    images = accelerated(pipeline, opaque, prompt)
    assert float((accelerated(pipeline, captured, prompt) - images).abs().max()) < 1e-5
    assert float((by_example(pipeline, opaque, prompt) - images).abs().max()) < 1e-5
    assert float((generate(pipeline, prompt) - images).abs().max()) > 1e-4


@exercises("image", "unet")
@works_with(
    "Models",
    "a U-Net (Stable Diffusion 1.5's class): whole-step plans",
    "works",
)
def test_a_unet_runs_by_whole_steps() -> None:
    pipeline = tiny_unet_pipeline()
    call = {"prompt": "a cat", "num_inference_steps": STEPS, "height": 8, "width": 8}
    plan = ditfastattn.calibrate(
        pipeline, call, target=Target.min_speedup(2.0), method="whole-steps"
    )
    assert plan.sites[0].latent == "sample"
    runs: list[int] = []
    handle = pipeline.unet.down_blocks[0].register_forward_hook(lambda *_: runs.append(1))
    images = accelerated(pipeline, plan, Prompt(call, SEED))
    handle.remove()
    assert len(runs) == STEPS  # two generations, of half of the steps
    assert float((by_example(pipeline, plan, Prompt(call, SEED)) - images).abs().max()) < 1e-5


class Watching(PixArtTransformer2DModel):
    """Read what is denoised, so that its graph could be another one at each step."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.abs().max() > 1e9:
            raise ValueError
        return super().forward(hidden_states, *args, **kwargs)


def test_a_model_that_reads_its_latent_is_called_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch._dynamo.reset()
    make, given = TINY_PIPELINES["pixart"]
    pipeline, call = make(), {"num_inference_steps": STEPS, **given}
    pipeline.transformer.__class__ = Watching
    with caplog.at_level(logging.WARNING, "ditfastattn"):
        plan = searched(pipeline, call, opaque=False)
    assert "called as it is" in caplog.text
    assert plan.model.structure.startswith("module:")
    images = accelerated(pipeline, plan, Prompt(call, SEED))
    assert float((by_example(pipeline, plan, Prompt(call, SEED)) - images).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", slow_but({torch.bfloat16}, [torch.bfloat16, torch.float16]))
def test_half_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    make, given = TINY_PIPELINES["pixart"]
    pipeline, call = make().to(dtype), {"num_inference_steps": STEPS, **given}
    prompt = Prompt(call, SEED)
    captured, opaque = (searched(pipeline, call, opaque) for opaque in (False, True))
    images = accelerated(pipeline, opaque, prompt)
    assert images.dtype == dtype
    assert torch.equal(by_example(pipeline, opaque, prompt), images)
    assert torch.equal(accelerated(pipeline, captured, prompt), images)


@pytest.fixture(scope="module")
def pixart() -> tuple[Any, dict[str, Any], Plan]:
    make, given = TINY_PIPELINES["pixart"]
    pipeline, call = make(), {"num_inference_steps": STEPS, **given}
    return pipeline, call, searched(pipeline, call, opaque=True)


@works_with(
    "Other calls than the plan's",
    "another guidance scale than a whole-step plan's",
    "refused",
    "`retarget` fits it again",
)
@pytest.mark.parametrize("opaque", [False, True], ids=["captured", "opaque"])
def test_another_guidance_scale_is_refused(opaque: bool) -> None:
    torch._dynamo.reset()
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    call = {"class_labels": [1], "num_inference_steps": STEPS, "guidance_scale": 2.0}
    plan = searched(pipeline, call, opaque)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    with pytest.raises(ConfigError, match=r"sampler\.guidance_scale"):
        generate(pipeline, Prompt(call | {"guidance_scale": 5.0}, SEED))


def test_other_weights_are_refused(pixart: tuple[Any, dict[str, Any], Plan]) -> None:
    plan = pixart[2]
    other = TINY_PIPELINES["pixart"][0]()
    with torch.no_grad():
        other.transformer.proj_out.weight.add_(1.0)
    with pytest.raises(ConfigError, match=r"model\.weights"):
        ditfastattn.accelerate(other, plan)


@pytest.mark.parametrize("last", range(STEPS - 1))
def test_an_interrupted_generation_leaves_nothing(
    last: int, pixart: tuple[Any, dict[str, Any], Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, call, plan = pixart
    images = accelerated(pipeline, plan, Prompt(call, SEED))
    ditfastattn.accelerate(pipeline, plan)
    own, steps = pipeline.scheduler.step, iter(range(STEPS))

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == last:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.scheduler, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            generate(pipeline, Prompt(call, SEED + 1))
    again = generate(pipeline, Prompt(call, SEED))
    ditfastattn.restore(pipeline)
    assert torch.equal(again, images)


@works_with(
    "Other calls than the plan's",
    "whole steps where guidance rescales each of several images (`guidance_rescale`)",
    "refused",
)
def test_guidance_that_is_not_known_is_refused_with_the_reason() -> None:
    pipeline, call = tiny_unet_pipeline(), {"num_inference_steps": 2, "guidance_rescale": 0.7}
    given = {"prompt": "a cat", "num_images_per_prompt": 2, "height": 8, "width": 8}
    with pytest.raises(ConfigError, match="something else at step 0"):
        searched(pipeline, {**call, **given}, opaque=True)


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit on three images: what is found differs, how it is found does not."""
    monkeypatch.setattr(whole_steps, "FITTED_ON", 3)


@pytest.mark.usefixtures("few_images")
def test_a_quality_is_met_on_the_worst_prompt(pixart: tuple[Any, dict[str, Any], Plan]) -> None:
    pipeline, call, _ = pixart
    prompts, unseen = split_prompts(call, 0), split_prompts(call, 500)
    plan = calibrate_whole_steps(pipeline, prompts, unseen, Options(Target.min_psnr(30.0)))
    found = plan.calibration
    assert found.calibrated is not None
    assert found.calibrated.worst >= 30.0
    assert found.held_out is not None
    assert found.held_out.worst >= 30.0
    dense = generate(pipeline, Prompt(call, 500))
    planned = accelerated(pipeline, plan, Prompt(call, 500))
    error = (dense - planned).square().mean()
    assert float(-10 * error.log10()) == pytest.approx(found.held_out.worst, abs=0.01)


def test_a_mask_continues_what_the_last_one_began(
    pixart: tuple[Any, dict[str, Any], Plan],
) -> None:
    pipeline, call, plan = pixart
    prompts, module = split_prompts(call, 0)[:2], transformer_of(pipeline, "test")
    observed = [observe(pipeline, prompt, plan.sampler.cfg_layout) for prompt in prompts]
    rollouts = [Rollout(module, each) for each in observed]
    begun: Begun = {}
    for runs, new in (([0, 2, 4], 3), ([0, 2, 3, 5], 2), ([0, 3], 1), ([0, 3], 0)):
        spent: list[float] = []
        mask, states = fit_mask(rollouts, runs, spent.append, begun=begun)
        alone, expected = fit_mask(rollouts, runs, lambda _: None)
        assert sum(spent) == new * len(prompts)
        assert list(begun) == [tuple(runs[: count + 1]) for count in range(len(runs))]
        for got, wanted in zip(mask.coefficients, alone.coefficients, strict=True):
            assert (got is None) == (wanted is None)
            assert got is None or wanted is None or torch.equal(got, wanted)
        for state, other in zip(states, expected, strict=True):
            assert torch.equal(state.latent, other.latent)
            assert len(state.returned) == len(other.returned)


@pytest.mark.usefixtures("few_images")
def test_an_interrupted_search_resumes(
    pixart: tuple[Any, dict[str, Any], Plan], tmp_path: Any
) -> None:
    pipeline, call, _ = pixart
    options: dict[str, Any] = {
        "target": Target.min_psnr(30.0),
        "method": "whole-steps",
        "out": tmp_path / "plan.json",
    }

    def stop(progress: Any) -> None:
        if "calibration" in progress.phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ditfastattn.calibrate(pipeline, call, on_progress=stop, **options)
    phases: list[str] = []
    plan = ditfastattn.calibrate(
        pipeline, call, on_progress=lambda progress: phases.append(progress.phase), **options
    )
    assert "which steps run" not in phases
    assert Plan.load(tmp_path / "plan.json") == plan
    assert not list(tmp_path.glob("*.search"))
