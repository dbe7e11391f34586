"""Name the models of the benchmark: how to open each, and what to generate with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.pipeline.guidance import detect_cfg_layout
from ditfastattn.runtime.pipeline.prompts import Prompt, generate, split_prompts

FIRST_TEST_SEED = 1000  # a search uses seeds from 0 and 500: no image is judged that it has seen


@dataclass(frozen=True)
class BenchModel:
    """Describe a model.

    Attributes:
        name: its name in options and records.
        open: returns its pipeline.
        call: what test image ``k`` is called with, besides the steps.
        calibration: the same of the prompts that plans are found on.
        conditional_first: whether the first half of a guided batch is the conditional one.
        guided: whether guidance doubles the batch.
        timestep_scale: what turns the transformer's timestep into one from 0 to 1000.
        trained: whether its images mean something.
    """

    name: str
    open: Callable[[], Any]
    call: Callable[[int], Mapping[str, Any]]
    calibration: Mapping[str, Any]
    conditional_first: bool = False
    guided: bool = True
    timestep_scale: float = 1.0
    trained: bool = True

    def test_prompts(self, count: int, steps: int) -> list[Prompt]:
        """Return prompts whose seeds no search uses."""
        return [
            Prompt({**self.call(index), "num_inference_steps": steps}, FIRST_TEST_SEED + index)
            for index in range(count)
        ]

    def calibration_prompts(self, steps: int) -> list[Prompt]:
        """Return the prompts that plans are found on."""
        return split_prompts(self.calibration_call(steps), 0)

    def calibration_call(self, steps: int) -> dict[str, Any]:
        """Return one call of all calibration prompts."""
        return {**self.calibration, "num_inference_steps": steps}


def _digits() -> Any:
    from ditfastattn.tools.digits_pipeline import embedded_pipeline

    pipeline = embedded_pipeline()
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    return pipeline


DEMO = BenchModel(
    name="demo",
    open=_digits,
    call=lambda index: {"class_labels": [index % 10], "guidance_scale": 2.0},
    calibration={"class_labels": [0, 3, 5, 8], "guidance_scale": 2.0},
    conditional_first=True,
)


def pipeline_model(name: str, pipeline: Any, call: Mapping[str, Any]) -> BenchModel:
    """Return a pipeline of the user's as a model; ``call`` as ``calibrate`` takes it.

    Its prompts are those of the plans and of the test images, which differ in their seeds.
    """
    layout = detect_cfg_layout(pipeline, split_prompts(call, 0)[0].call)
    prompts = split_prompts(call, 0)
    return BenchModel(
        name=name,
        open=lambda: pipeline,
        call=lambda index: prompts[index % len(prompts)].call,
        calibration=call,
        conditional_first=layout is CfgLayout.COND_FIRST,
        guided=layout is not CfgLayout.NONE,
        timestep_scale=_timestep_scale(pipeline, prompts[0].call),
    )


def _timestep_scale(pipeline: Any, call: Mapping[str, Any]) -> float:
    """Return what turns the transformer's timestep into one from 0 to 1000."""
    seen: list[float] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(float(kwargs.get("timestep", torch.tensor(1000.0)).flatten()[0]))

    hook = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        generate(pipeline, Prompt({**call, "num_inference_steps": 1}, 0))
    finally:
        hook.remove()
    return 1000.0 if max(seen) <= 1.0 else 1.0


def model_named(name: str) -> BenchModel:
    """Return the model of this name: the demo, or one of random weights.

    Raises:
        ConfigError: there is none.
    """
    from ditfastattn.tools.bench.random_models import ARCHITECTURES, random_pipeline

    if name == DEMO.name:
        return DEMO
    if name not in ARCHITECTURES:
        raise ConfigError(
            "there is no such model",
            where="--model",
            got=name,
            expected=", ".join([DEMO.name, *ARCHITECTURES]),
        )
    architecture = ARCHITECTURES[name]()
    return BenchModel(
        name=name,
        open=lambda: random_pipeline(architecture),
        call=lambda index: {"image": [index]},
        calibration={"image": [0, 1]},
        guided=architecture.guided,
        timestep_scale=1.0 if architecture.guided else 1000.0,
        trained=False,
    )
