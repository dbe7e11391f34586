"""The models of the benchmark: how to open each, and what to generate with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.pipeline.guidance import detect_cfg_layout
from ditfastattn.runtime.pipeline.prompts import Prompt, generate, split_prompts
from ditfastattn.tools.embedded import ModelName, embedded_model
from ditfastattn.tools.emoji.recipe import VOCABULARY

FIRST_TEST_SEED = (
    1000  # searches use seeds from 0 and 500, so that no test image is one they have seen
)


@dataclass(frozen=True)
class BenchModel:
    """A model to generate with.

    Attributes:
        name: its name in options and records.
        open: returns its pipeline.
        call: the arguments for test image ``k``, without the steps.
        calibration: the arguments for all calibration prompts.
        conditional_first: whether the first half of a guided batch is the conditional one.
        guided: whether guidance doubles the batch.
        timestep_scale: converts the transformer's timestep to one from 0 to 1000.
        trained: whether its images are meaningful.
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
        """Return prompts with seeds that no search uses."""
        return [
            Prompt({**self.call(index), "num_inference_steps": steps}, FIRST_TEST_SEED + index)
            for index in range(count)
        ]

    def calibration_prompts(self, steps: int) -> list[Prompt]:
        """Return the prompts that plans are calibrated on."""
        return split_prompts(self.calibration_call(steps), 0)

    def calibration_call(self, steps: int) -> dict[str, Any]:
        """Return one call of all calibration prompts."""
        return {**self.calibration, "num_inference_steps": steps}


DIGITS = BenchModel(
    name=ModelName.DIGITS,
    open=lambda: embedded_model(ModelName.DIGITS).open(),
    call=lambda index: {"class_labels": [index % 10], "guidance_scale": 2.0},
    calibration={"class_labels": [0, 3, 5, 8, 1, 2, 6, 7, 4, 9], "guidance_scale": 2.0},
    conditional_first=True,
)


_CAPTIONS = VOCABULARY.captions()  # the next of 29 places on is of another thing and hue

EMOJI = BenchModel(
    name=ModelName.EMOJI,
    open=lambda: embedded_model(ModelName.EMOJI).open(),
    call=lambda index: {
        "prompt": [str(_CAPTIONS[(29 * index + 3) % len(_CAPTIONS)])],
        "guidance_scale": 2.5,
    },
    calibration={
        "prompt": [str(_CAPTIONS[(53 * index) % len(_CAPTIONS)]) for index in range(8)],
        "guidance_scale": 2.5,
    },
)
_EMBEDDED = {model.name: model for model in (DIGITS, EMOJI)}


def pipeline_model(name: str, pipeline: Any, call: Mapping[str, Any]) -> BenchModel:
    """Return a user's pipeline as a model; ``call`` is as for ``calibrate``.

    Plans and test images have the same prompts, with different seeds.
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
    """Return the factor from the transformer's timestep to one from 0 to 1000."""
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
    """Return the model called ``name``: an embedded one, or one with random weights.

    Raises:
        ConfigError: there is no such model.
    """
    from ditfastattn.tools.bench.random_models import ARCHITECTURES, random_pipeline

    if name in _EMBEDDED:
        return _EMBEDDED[name]
    if name not in ARCHITECTURES:
        raise ConfigError(
            "there is no such model",
            where="--model",
            got=name,
            expected=", ".join([*_EMBEDDED, *ARCHITECTURES]),
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
