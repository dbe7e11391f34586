"""The models that come with the package, as the demo and its tools see them.

This file alone says which models those are: what draws with each, on which conditions its plans
were searched and are compared, and how to read back whether an image shows what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditfastattn.runtime.search.methods import Method

Conditions = Mapping[str, Sequence[Any]]  # a list entry per image, by the pipeline's argument


class ModelName(StrEnum):
    """Name an embedded model."""

    EMOJI = "emoji"
    DIGITS = "digits"


@dataclass(frozen=True)
class EmbeddedModel:
    """Describe an embedded model.

    Attributes:
        key: what it is called in options.
        name: in reports.
        folder: its weights, and its plans in ``plans``.
        load: loads its pipeline.
        call: the other arguments of a generation: steps and guidance.
        calibration: conditions to search plans on.
        held_out: conditions to accept plans on.
        compared: conditions to compare plans on, repeated as often as needed.
        method: how its plans are searched.
        least_ssim: for which SSIM on the worst prompt, the strictest first.
        obeyed: what ``reads_back`` measures.
        reads_back: from images ``[B, C, H, W]`` in [0, 1] and what a generation was called with
            to whether each of them shows what was asked for, ``[B]``.
    """

    key: ModelName
    name: str
    folder: Path
    load: Callable[[], Any]
    call: Mapping[str, Any]
    calibration: Conditions
    held_out: Conditions
    compared: Conditions
    method: Method
    least_ssim: tuple[float, float, float]
    obeyed: str
    reads_back: Callable[[Tensor, Mapping[str, Any]], Tensor] = field(repr=False)

    def open(self) -> Any:
        """Load its pipeline, and switch its progress bar off."""
        pipeline = self.load()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def plans(self) -> Path:
        """Return the folder of the plans that come with the model."""
        return self.folder / "plans"

    def share_obeyed(self, images: Tensor, conditions: Sequence[Mapping[str, Any]]) -> float:
        """Return the share of ``images`` that show what their ``conditions``, one each, ask for."""
        pairs = zip(images, conditions, strict=True)
        read = [self.reads_back(one[None], asked) for one, asked in pairs]
        return torch.cat(read).float().mean().item()

    def conditions(self, count: int) -> list[dict[str, Any]]:
        """Return ``count`` of the compared conditions, each of one image."""
        return [
            {name: [items[number % len(items)]] for name, items in self.compared.items()}
            for number in range(count)
        ]


def embedded_model(name: ModelName = ModelName.EMOJI) -> EmbeddedModel:
    """Return a model that comes with the package."""
    return {ModelName.EMOJI: _emoji, ModelName.DIGITS: _digits}[name]()


def _emoji() -> EmbeddedModel:
    """Return the text-to-image model of emoji: what the demo shows."""
    from ditfastattn.tools.emoji import pipeline, read_back  # these load diffusers

    return EmbeddedModel(
        key=ModelName.EMOJI,
        name="emoji-dit-64",
        folder=pipeline.EMBEDDED_FOLDER,
        load=pipeline.embedded_pipeline,
        call={"num_inference_steps": 20, "guidance_scale": 2.5},
        calibration={
            "prompt": [
                "a panda on blue",
                "a strawberry on green, facing right",
                "a rocket on purple",
                "a turtle on yellow, facing right",
                "a burger on cyan",
                "a unicorn on red, facing right",
            ]
        },
        held_out={
            "prompt": [
                "a fox on lime",
                "a whale on pink, facing right",
                "a mushroom on cyan",
                "a robot on blue, facing right",
            ]
        },
        compared={
            "prompt": [
                "a tiger on cyan",
                "a penguin on pink, facing right",
                "a frog on purple",
                "an avocado on blue",
                "a dinosaur on yellow, facing right",
                "a car on green",
                "a koala on red, facing right",
                "a watermelon on blue",
                "a snail on lime, facing right",
                "a ghost on purple",
            ]
        },
        method=Method.WHOLE_STEPS,
        least_ssim=(0.998, 0.99, 0.95),
        obeyed="on the hue asked for",
        reads_back=lambda images, call: read_back.hue_as_asked(images, call["prompt"]),
    )


def _digits() -> EmbeddedModel:
    """Return the class-conditional model of digits, the smallest that draws something."""
    from ditfastattn.tools import digits_data, digits_pipeline  # these load diffusers

    def reads_back(images: Tensor, call: Mapping[str, Any]) -> Tensor:
        shown = torch.from_numpy(digits_data.classify(images * 2.0 - 1.0))
        return shown == torch.tensor(call["class_labels"])

    return EmbeddedModel(
        key=ModelName.DIGITS,
        name="digits-dit-64",
        folder=digits_pipeline.EMBEDDED_FOLDER,
        load=digits_pipeline.embedded_pipeline,
        call={"num_inference_steps": 20, "guidance_scale": 2.0},
        calibration={"class_labels": [0, 3, 5, 8]},
        held_out={"class_labels": [1, 4, 6, 9]},
        compared={"class_labels": list(range(digits_data.NUM_CLASSES))},
        method=Method.GLOBAL,
        least_ssim=(0.99, 0.95, 0.85),
        obeyed="classified as the requested digit",
        reads_back=reads_back,
    )


def still_obeyed(dense: Tensor, planned: Tensor, call: Mapping[str, Any]) -> Tensor:
    """Return 1 where a planned image shows the digit asked for if the dense one does, ``[B]``.

    It is a metric for targets: ``--metric ditfastattn.tools.embedded:still_obeyed --at-least 1``.
    Images are ``[B, C, H, W]`` in [0, 1].
    """
    reads_back = embedded_model(ModelName.DIGITS).reads_back
    return (reads_back(planned, call) | ~reads_back(dense, call)).float()
