"""A name that is no choice is refused by every function that takes one, before it does anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import ditfastattn
from ditfastattn import ConfigError, Target
from ditfastattn.core.choices import choice_named
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.options import parse_options
from tests.helpers import tiny_digits_pipeline

CALL = {"class_labels": [1, 2], "num_inference_steps": 4}


def pipeline() -> Any:
    return tiny_digits_pipeline(DDIMScheduler(clip_sample=False))


def backend(**options: Any) -> Any:
    return parse_options(options, None)


def calibrate(**options: Any) -> Any:
    return ditfastattn.calibrate(pipeline(), CALL, target=Target.min_ssim(0.9), **options)


def accelerate(**options: Any) -> Any:
    return ditfastattn.accelerate(pipeline(), **options)


TAKERS: list[tuple[Callable[..., Any], str]] = [
    *((calibrate, name) for name in ("method", "objective", "windows", "cache_dtype", "lowering")),
    *((accelerate, name) for name in ("on_mismatch", "lowering", "check_weights")),
    *((backend, name) for name in ("lowering", "check_weights", "cfg_layout")),
    (lambda **given: ditfastattn.validate(None, None, CALL, **given), "lowering"),  # type: ignore[arg-type]
    (lambda **given: ditfastattn.export(None, None, None, "b", **given), "format"),  # type: ignore[arg-type]
    (lambda **given: ditfastattn.build("bundle", **given), "layout"),
    (lambda **given: ditfastattn.export_triton("bundle", "repository", **given), "backend"),
]


@pytest.mark.parametrize(("take", "name"), TAKERS)
def test_a_name_that_is_no_choice_is_refused(take: Callable[..., Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}[\s\S]*got: *'nope'[\s\S]*expected: *\w+"):
        take(**{name: "nope"})


def test_a_choice_and_its_name_are_the_choice() -> None:
    assert choice_named(Lowering, "eager", "here") is Lowering.EAGER
    assert choice_named(Lowering, Lowering.EAGER, "here") is Lowering.EAGER
