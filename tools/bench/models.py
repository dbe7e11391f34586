"""Name the models of the benchmark: how to open each, and what to generate with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ditfastattn.errors import ConfigError
from ditfastattn.runtime.search.prompts import Prompt, split_prompts

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
    """

    name: str
    open: Callable[[], Any]
    call: Callable[[int], Mapping[str, Any]]
    calibration: Mapping[str, Any]
    conditional_first: bool

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


MODELS: tuple[BenchModel, ...] = (
    BenchModel(
        name="demo",
        open=_digits,
        call=lambda index: {"class_labels": [index % 10], "guidance_scale": 2.0},
        calibration={"class_labels": [0, 3, 5, 8], "guidance_scale": 2.0},
        conditional_first=True,
    ),
)


def model_named(name: str) -> BenchModel:
    """Return the model of this name.

    Raises:
        ConfigError: there is none.
    """
    for model in MODELS:
        if model.name == name:
            return model
    raise ConfigError(
        "there is no such model",
        where="--model",
        got=name,
        expected=", ".join(model.name for model in MODELS),
    )
