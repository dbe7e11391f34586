"""Runs of a mask are moved one by one, while that is worth more to all samples."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

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


def near(*wanted: int) -> Worth:
    """Return what is worth the more, the nearer the runs are to those ``wanted``."""
    return lambda mask, _: -sum(abs(a - b) for a, b in zip(mask.runs, wanted, strict=True))


def climbed(whole: WholeStepSearch, runs: Sequence[int], *worths: Worth) -> tuple[int, ...]:
    samples = [Sample(whole.rollouts[:1], worth) for worth in worths]
    return climb(samples, runs, lambda _: None)


def test_runs_move_to_where_they_are_worth_most(whole: WholeStepSearch) -> None:
    assert climbed(whole, (0, 3, 5), near(0, 2, 4)) == (0, 2, 4)
    assert climbed(whole, (0, 1, 2), near(0, 1, 5)) == (0, 1, 5)


def test_the_first_run_stays_and_no_two_meet(whole: WholeStepSearch) -> None:
    assert climbed(whole, (0, 2, 3), near(1, 1, 1)) == (0, 1, 2)
    assert climbed(whole, (0, 4, 5), near(9, 9, 9)) == (0, 4, 5)


def test_a_move_must_be_worth_more_to_each_sample(whole: WholeStepSearch) -> None:
    assert climbed(whole, (0, 3, 5), near(0, 2, 5), near(0, 3, 4)) == (0, 3, 5)


def test_a_move_goes_on_from_the_runs_before_it(whole: WholeStepSearch) -> None:
    spent: list[float] = []
    climb([Sample(whole.rollouts, near(0, 1, 3))], (0, 1, 3), spent.append)
    # All three runs of the mask; then those from the moved one on: (0, 2, 3), (0, 1, 2), (0, 1, 4).
    assert sum(spent) == len(whole.rollouts) * (3 + 2 + 1 + 1)


class Moving(dict[int, tuple[int, ...]]):
    """Masks of which that of two runs becomes another one."""

    def climb(self, number: int) -> bool:
        self[number] = {2: (0, 3)}.get(number, self[number])
        return number == 2


@pytest.mark.parametrize("enough", [(0, 3), (0, 1, 2)])
def test_fewer_runs_are_taken_if_moved_they_do(
    enough: tuple[int, ...], whole: WholeStepSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fitted(runs: Sequence[int]) -> Judged:
        judged: list[Any] = [tuple(runs)]
        return Judged(FittedMask(tuple(runs), (None,) * STEPS, 1), judged, judged)

    monkeypatch.setitem(
        vars(whole), "masks", Moving({1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 1, 2, 3)})
    )
    monkeypatch.setattr(whole, "_calibrated", fitted)
    monkeypatch.setattr(whole, "_fitted_best", fitted)
    meeting = {enough, (0, 1, 2), (0, 1, 2, 3)}
    monkeypatch.setattr(whole.judge, "meets", lambda judged: meeting.issuperset(judged))
    found = whole.fewest()
    assert found is not None
    assert found.mask.runs == enough
