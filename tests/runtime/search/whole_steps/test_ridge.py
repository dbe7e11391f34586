"""How closely fits follow their images is chosen on images that they have not seen."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ditfastattn import Target
from ditfastattn.runtime.pipeline.prompts import split_prompts
from ditfastattn.runtime.search.judge.judgement import Judgement
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.whole_steps import calibrate, ridge
from ditfastattn.runtime.search.whole_steps.calibrate import Options, Prepared, prepare
from ditfastattn.runtime.search.whole_steps.fit import fit, linear_rule
from ditfastattn.runtime.search.whole_steps.masks import run_step, skip_step
from tests.tiny_pipelines import TINY_PIPELINES

STEPS = 5
RUNS = (0, 2, 3)
LINEAR = 1e9  # a ridge that keeps to the linear rule


@pytest.fixture(scope="module")
def prepared() -> Generator[Prepared]:
    make, given = TINY_PIPELINES["pixart"]
    call = {"num_inference_steps": STEPS, **given}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "FITTED_ON", 3)
        prompts, unseen = split_prompts(call, 0), split_prompts(call, 500)
        options = Options(Target.min_psnr(10.0), opaque=True)
        yield prepare(make(), prompts, unseen, options)


def test_each_image_is_generated_by_a_fit_to_the_others(prepared: Prepared) -> None:
    rollouts = prepared.search(Checkpoint()).rollouts
    spent: list[float] = []
    folds = ridge.cross_validated(rollouts, RUNS, fit, spent.append)
    assert [fold.images for fold in folds] == [(0,), (1,), (2,)]
    assert sum(spent) == 2 * len(RUNS) * len(rollouts)
    begun = run_step(rollouts, [rollout.begin for rollout in rollouts], 0)
    for fold in folds:
        (own,) = fold.images
        others = [image for image in range(3) if image != own]
        found = fit([rollouts[k] for k in others], [begun[k] for k in others], 1, 1)
        assert fold.coefficients[0] is None
        assert fold.coefficients[1] is not None
        assert torch.equal(fold.coefficients[1], found)
        states = begun[own : own + 1]
        for step, coefficients in enumerate(fold.coefficients[1:], 1):
            if coefficients is None:
                states = run_step([rollouts[own]], states, step)
            else:
                states = skip_step([rollouts[own]], states, step, coefficients)
        assert torch.equal(states[0].latent, fold.states[0].latent)


@pytest.mark.parametrize(
    ("at_least", "usual", "looser", "chosen"),
    [
        (True, [1.0, 5.0, 9.0], [2.0, 4.0, 9.0], True),
        (True, [1.0, 5.0, 9.0], [2.0, 4.0, 8.0], False),  # the mean is worse
        (True, [1.0, 5.0, 9.0], [0.5, 9.0, 9.0], False),
        (False, [1.0, 5.0, 9.0], [2.0, 5.0, 8.0], True),
        (False, [1.0, 5.0, 9.0], [0.0, 0.0, 10.0], False),
    ],
)
def test_unseen_images_choose(
    at_least: bool,
    usual: list[float],
    looser: list[float],
    chosen: bool,
    prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bound: dict[str, Any] = {"at_least": 0.0} if at_least else {"at_most": 0.0}
    target = Target.quality(lambda _, planned: planned.flatten(1).mean(1), **bound)
    search = prepared.search(Checkpoint())
    monkeypatch.setattr(search, "request", replace(search.request, target=target))
    values = iter([*usual, *looser])  # of three images
    monkeypatch.setattr(search.judge, "replayed", lambda *_: [Judgement(next(values), 0.0, None)])
    assert search._looser(RUNS) == (list(ridge.LOOSER) if chosen else [])


class Promising(dict[int, tuple[int, ...]]):
    """Masks that promise to meet any target, and are as good as they get."""

    def promises(self, _number: int) -> bool:
        return True

    def climb(self, _number: int) -> bool:
        return False


@pytest.mark.parametrize("meets", [True, False])
def test_a_looser_fit_is_tried_where_held_out_images_miss(
    meets: bool, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = prepared.search(Checkpoint())
    monkeypatch.setattr(search, "_looser", lambda _: [LINEAR])
    monkeypatch.setitem(vars(search), "masks", Promising({len(RUNS): RUNS}))
    held_out = len(search.request.held_out)
    monkeypatch.setattr(
        search.judge,
        "meets",
        lambda judged: meets or len(judged) != held_out or search._ridge == LINEAR,
    )
    found = search.fewest()
    assert found is not None
    assert found.checked
    rollouts = search.rollouts
    begun = run_step(rollouts, [rollout.begin for rollout in rollouts], 0)
    linear = linear_rule(rollouts[0], begun[0], 1, 1).float()
    made = found.mask.coefficients[1]
    assert made is not None
    assert torch.allclose(made, linear, atol=1e-6) != meets
