"""Generations of a pipeline that was accelerated with a plan book."""

from __future__ import annotations

import logging
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditfastattn
from ditfastattn import Book, ConfigError, Figures, Plan, Strategy, Target
from ditfastattn.passes.plan.calibration import Measured
from ditfastattn.runtime import accelerate as accelerating
from ditfastattn.runtime import lowering, plan_choice
from ditfastattn.runtime.accelerate import chosen_plan
from tests.helpers import attentive_pipeline
from tests.plans import plan_for
from tests.three_steps import CALL, run
from tests.works_with import works_with

F, S = Strategy.FULL, Strategy.SHARE_STEP
ROWS = {"high": (F, F, S), "medium": (F, S, S)}
FOUR = (F, S, F, S)
FIGURES = Figures(
    source="validation", metric="ssim", quality=Measured(prompts=4, mean=0.95, worst=0.95)
)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: plan_for(attentive_pipeline(), CALL, rows) for name, rows in ROWS.items()}


@pytest.fixture
def book(tmp_path: Path, plans: dict[str, Plan]) -> Book:
    return filled(tmp_path, plans)


def filled(folder: Path, plans: dict[str, Plan], most_compiled: int = 8) -> Book:
    """Return a book with a plan for each tier, the first of which is the default."""
    tiers = {name: Target.min_ssim(0.9 - 0.1 * place) for place, name in enumerate(plans)}
    made = ditfastattn.book(folder / "book", tiers, most_compiled=most_compiled)
    for tier, plan in plans.items():
        made.add(plan, tier, FIGURES)
    return made


_alone: dict[str, Tensor] = {}


def alone(plan: Plan | None, **changes: Any) -> Tensor:
    """Return the images of a pipeline that has this plan alone, or none; made once."""
    key = repr((plan, changes))
    if key not in _alone:
        _alone[key] = _generated(plan, **changes)
    return _alone[key]


def _generated(plan: Plan | None, **changes: Any) -> Tensor:
    pipeline = attentive_pipeline()
    if plan is not None:
        ditfastattn.accelerate(pipeline, plan, lowering="eager")
    return run(pipeline, **changes)


def in_tier(pipeline: Any, tier: str, **changes: Any) -> Tensor:
    with ditfastattn.quality(tier):
        return run(pipeline, **changes)


@works_with(
    "Plan books",
    "`accelerate(pipeline, book)`, then `with ditfastattn.quality(tier)` around each generation",
    "works",
    "each by the plan of its tier; `lossless` is dense, bit for bit",
)
def test_each_generation_runs_by_the_plan_of_its_tier(book: Book, plans: dict[str, Plan]) -> None:
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, book, lowering="eager")
    expected = {"lossless": alone(None), **{tier: alone(plan) for tier, plan in plans.items()}}
    assert not torch.equal(expected["high"], expected["medium"])
    for tier in (*expected, *reversed(expected)):
        assert torch.equal(in_tier(pipeline, tier), expected[tier])
        assert chosen_plan(pipeline).tier == tier
    assert torch.equal(run(pipeline), expected["high"])  # the default
    assert ditfastattn.dense_generations(pipeline) == {}


def test_a_tier_that_the_book_does_not_have_is_refused(book: Book) -> None:
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, book, on_mismatch="dense", lowering="eager")
    with pytest.raises(ConfigError, match=r"no such tier[\s\S]*lossless, high, medium"):
        in_tier(pipeline, "highest")


def test_a_tier_without_a_book_is_refused_unless_it_is_dense(plans: dict[str, Plan]) -> None:
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, plans["high"], lowering="eager")
    with pytest.raises(ConfigError, match="the plans are of no book"):
        in_tier(pipeline, "high")
    assert torch.equal(in_tier(pipeline, "lossless"), alone(None))
    assert torch.equal(run(pipeline), alone(plans["high"]))


def test_a_generation_that_no_plan_of_the_tier_fits_names_the_nearest(
    tmp_path: Path, plans: dict[str, Plan], caplog: pytest.LogCaptureFixture
) -> None:
    book = filled(tmp_path, plans)
    four = plan_for(attentive_pipeline(), CALL | {"num_inference_steps": 4}, FOUR)
    far = four.model_copy(update={"inputs": four.inputs | {"hidden_states": (1, 32, 32)}})
    figures = book.plans[0][0].figures
    added = book.add(four, "high", figures)
    book.add(far, "high", figures)
    pipeline = attentive_pipeline()
    with pytest.raises(ConfigError, match=r"of the tier 'high'[\s\S]*sampler\.steps"):
        run(ditfastattn.accelerate(pipeline, book, lowering="eager"), num_inference_steps=5)
    ditfastattn.accelerate(pipeline, book, on_mismatch="dense", lowering="eager")
    with caplog.at_level(logging.WARNING, "ditfastattn"):
        images = run(pipeline, num_inference_steps=4, guidance_scale=3.0)
    assert torch.equal(images, alone(None, num_inference_steps=4, guidance_scale=3.0))
    (reason,) = ditfastattn.dense_generations(pipeline)
    assert reason.startswith(f"the nearest plan, {added.name}: plan.sampler.guidance_scale")
    assert any(reason in text for text in caplog.messages)
    assert chosen_plan(pipeline).reason == reason


def test_an_empty_tier_runs_dense(tmp_path: Path) -> None:
    book = ditfastattn.book(tmp_path / "book", {"high": Target.min_ssim(0.9)})
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, book, on_mismatch="dense", lowering="eager")
    assert torch.equal(run(pipeline), alone(None))
    assert list(ditfastattn.dense_generations(pipeline)) == ["the tier 'high' has no plans"]


def test_reasons_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_choice, "MOST_REASONS", 2)
    book = ditfastattn.book(tmp_path / "book", {"high": Target.min_ssim(0.9)})
    pipeline = attentive_pipeline()
    book.add(plan_for(attentive_pipeline(), CALL, ROWS["high"]), "high", FIGURES)
    ditfastattn.accelerate(pipeline, book, on_mismatch="dense", lowering="eager")
    for scale in (3.0, 4.0, 5.0, 6.0, 3.0):
        run(pipeline, guidance_scale=scale)
    assert list(ditfastattn.dense_generations(pipeline).values()) == [2, 1, 2]


def test_plans_that_were_not_used_for_long_are_released(
    tmp_path: Path, plans: dict[str, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    begin = accelerating._PlannedForward.__init__

    def watched(self: Any, *args: Any) -> None:
        begin(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(accelerating._PlannedForward, "__init__", watched)
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, filled(tmp_path, plans, most_compiled=1), lowering="eager")
    for tier in ("high", "high", "medium", "high"):
        with ditfastattn.generation():
            assert torch.equal(in_tier(pipeline, tier), alone(plans[tier]))
    own = [ref() for ref in made if ref() is not None]
    held = [each for each in own if each is not None and each._options.plan in plans.values()]
    assert len([each for each in held if each._watch._pipeline() is pipeline]) == 1


@pytest.mark.slow  # regions are shared in tests/runtime/test_lowering.py too
def test_plans_of_equal_steps_share_what_is_compiled(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both plans run full and shared steps, so the second one compiles nothing new."""
    compiled: list[Any] = []

    def count(module: Any, *_: Any) -> Any:
        compiled.append(module)
        return module

    monkeypatch.setattr(lowering, "_compile", count)
    monkeypatch.setattr(lowering, "_compiled", weakref.WeakValueDictionary())
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, book)
    in_tier(pipeline, "high")
    first = len(compiled)
    assert first > 0
    in_tier(pipeline, "medium")
    assert len(compiled) == first


@works_with(
    "Plan books",
    "two pipelines that share a transformer, each in a thread, of other tiers and steps",
    "works",
    "each generation keeps the plan that it began with",
)
def test_generations_of_two_threads_keep_their_plans(
    tmp_path: Path, plans: dict[str, Plan]
) -> None:
    """The second one begins in the middle of the first one."""
    four = plan_for(attentive_pipeline(), CALL | {"num_inference_steps": 4}, FOUR)
    book = filled(tmp_path, {"high": plans["high"], "medium": four})
    first = attentive_pipeline()
    ditfastattn.accelerate(first, book, lowering="eager")
    second: Any = type(first)(
        first.transformer, type(first.scheduler).from_config(first.scheduler.config)
    )
    second.set_progress_bar_config(disable=True)
    begun, ended = threading.Event(), threading.Event()
    step, found = first.scheduler.step, {}

    def waiting(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert ended.wait(60)
        return step(*args, **kwargs)

    first.scheduler.step = waiting

    def generate() -> None:
        found["first"] = in_tier(first, "high")

    thread = threading.Thread(target=generate)
    thread.start()
    assert begun.wait(60)
    found["second"] = in_tier(second, "medium", num_inference_steps=4)
    ended.set()
    thread.join()
    assert torch.equal(found["first"], alone(plans["high"]))
    assert torch.equal(found["second"], alone(four, num_inference_steps=4))
