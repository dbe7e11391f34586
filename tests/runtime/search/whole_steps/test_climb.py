"""Runs of a mask are moved one by one, while that is worth more to the images."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, ClassVar

import pytest

from ditfastattn import Target
from ditfastattn.runtime.pipeline.prompts import split_prompts
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.whole_steps import calibrate
from ditfastattn.runtime.search.whole_steps.calibrate import Options, prepare
from ditfastattn.runtime.search.whole_steps.candidates import FittedMask
from ditfastattn.runtime.search.whole_steps.climb import Sample, Worth, climb
from ditfastattn.runtime.search.whole_steps.search import Judged, WholeStepSearch
from tests.tiny_pipelines import TINY_PIPELINES

STEPS = 6


def search_for(target: Target) -> WholeStepSearch:
    make, given = TINY_PIPELINES["pixart"]
    call = {"num_inference_steps": STEPS, **given}
    prompts, unseen = split_prompts(call, 0), split_prompts(call, 500)
    return prepare(make(), prompts, unseen, Options(target, opaque=True)).search(Checkpoint())


@pytest.fixture(scope="module")
def whole() -> Generator[WholeStepSearch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "FITTED_ON", 2)
        yield search_for(Target.min_psnr(10.0))


def near(*wanted: int, images: int = 1) -> Worth:
    """Return what is worth the more, the nearer the runs are to those ``wanted``, in order."""

    def worth(mask: FittedMask, _: Any) -> list[float]:
        return [float(-sum(abs(a - b) for a, b in zip(mask.runs, wanted, strict=False)))] * images

    return worth


def climbed(
    whole: WholeStepSearch, runs: Sequence[int], every: Worth, few: Worth | None = None
) -> tuple[int, ...]:
    one = whole.rollouts[:1]
    return climb(few and Sample(one, few), Sample(one, every), runs, lambda _: None)


def test_runs_move_to_where_they_are_worth_most(whole: WholeStepSearch) -> None:
    assert climbed(whole, (0, 3, 5), near(0, 2, 4)) == (0, 2, 4)
    assert climbed(whole, (0, 1, 2), near(0, 1, 5)) == (0, 1, 5)


def test_the_first_run_stays_and_no_two_meet(whole: WholeStepSearch) -> None:
    assert climbed(whole, (0, 2, 3), near(1, 1, 1)) == (0, 1, 2)
    assert climbed(whole, (0, 4, 5), near(9, 9, 9)) == (0, 4, 5)


def test_the_worst_image_counts_as_much_as_the_mean(whole: WholeStepSearch) -> None:
    def worth(mask: FittedMask, _: Any) -> list[float]:
        return [40.0 + mask.runs[1], 30.0 - 2 * mask.runs[1]]

    assert climbed(whole, (0, 3, 5), worth)[1] == 1


def test_few_images_rule_out_what_they_lose_by_and_decide_nothing(whole: WholeStepSearch) -> None:
    wanted = near(0, 2, 4)
    assert climbed(whole, (0, 3, 5), wanted, few=near(0, 3, 4)) == (0, 3, 4)
    assert climbed(whole, (0, 3, 5), wanted, few=lambda *_: [0.0]) == (0, 2, 4)

    def by_chance(mask: FittedMask, _: Any) -> list[float]:
        moved = mask.runs != (0, 3, 5)
        return [moved * 4.0, moved * -5.0]  # lost 0.5 +- 4.5

    assert climbed(whole, (0, 3, 5), wanted, few=by_chance) == (0, 2, 4)


def test_images_without_error_are_compared(whole: WholeStepSearch) -> None:
    perfect = [float("inf"), 1.0, 1.0]
    for few in (lambda *_: perfect, lambda mask, _: perfect if mask.runs[1] == 3 else [2.0] * 3):
        assert climbed(whole, (0, 3, 5), near(0, 2, 5), few=few)[1] in (2, 3)


def test_a_late_run_goes_to_the_gap_where_it_is_worth_most(whole: WholeStepSearch) -> None:
    def covered(mask: FittedMask, _: Any) -> list[float]:
        return [float(-sum(min(abs(step - run) for run in mask.runs) for step in (0, 2, 4)))]

    # No single move by one step is worth more: (0, 3, 5) is as far from 2 and 4 together.
    assert climbed(whole, (0, 4, 5), covered) == (0, 2, 4)


def test_a_move_goes_on_from_the_runs_before_it(whole: WholeStepSearch) -> None:
    spent: list[float] = []
    every = Sample(whole.rollouts, near(0, 1, 3, images=len(whole.rollouts)))
    climb(None, every, (0, 1, 3), spent.append)
    # All three runs of the mask, then those after what is known: (0, 3) and (0, 1), which have one
    # run fewer, and (0, 2, 3), (0, 1, 2), (0, 1, 4), of which one is moved.
    assert sum(spent) == len(whole.rollouts) * (3 + 1 + 0 + 2 + 1 + 1)


class Moving(dict[int, tuple[int, ...]]):
    """Masks of which some become others; from three runs on they promise to meet the target."""

    moves: ClassVar = {2: (0, 3), 3: (0, 1, 4)}

    def climb(self, number: int) -> bool:
        self[number] = self.moves.get(number, self[number])
        return number in self.moves

    def promises(self, number: int) -> bool:
        return number > 2


@pytest.mark.parametrize(
    ("meeting", "fewest"),
    [
        ([(0, 3), (0, 1, 2), (0, 1, 2, 3)], (0, 3)),
        ([(0, 1, 2), (0, 1, 4), (0, 1, 2, 3)], (0, 1, 2)),
        ([(0, 1), (0, 3), (0, 1, 4), (0, 1, 2, 3)], (0, 1, 4)),
        ([(0, 1, 2, 3)], (0, 1, 2, 3)),
    ],
    ids=["one fewer, moved", "as found", "moved", "one more"],
)
def test_runs_are_moved_where_that_may_do(
    meeting: list[tuple[int, ...]],
    fewest: tuple[int, ...],
    whole: WholeStepSearch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fitted(runs: Sequence[int]) -> Judged:
        judged: list[Any] = [tuple(runs)]
        return Judged(FittedMask(tuple(runs), (None,) * STEPS, 1), judged, judged)

    masks = Moving({1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 1, 2, 3)})
    monkeypatch.setitem(vars(whole), "masks", masks)
    monkeypatch.setattr(whole, "_calibrated", fitted)
    monkeypatch.setattr(whole, "_fitted_best", fitted)
    monkeypatch.setattr(whole.judge, "meets", lambda judged: set(meeting).issuperset(judged))
    found = whole.fewest()
    assert found is not None
    assert found.mask.runs == fewest
