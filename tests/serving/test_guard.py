"""Images that are made again, dense, and compared with what their tier promises."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import ditfastattn
from ditfastattn import ConfigError, Figures, Plan, Target
from ditfastattn.passes.plan.calibration import Measured
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.job import Job, Made
from ditfastattn.serving.limits import Limits
from ditfastattn.serving.request import ImageRequest
from tests.helpers import attentive_pipeline
from tests.serving.servers import ASK, alone, running
from tests.three_steps import CALL
from tests.works_with import works_with


def server_of(folder: Path, plan: Plan, target: Target, every: int, fall_back: bool) -> ImageServer:
    """Return a guarded server of one plan, which is recorded as perfect."""
    torch._dynamo.reset()
    book = ditfastattn.book(folder, {"high": target})
    perfect = Measured(prompts=4, mean=1.0, worst=1.0)
    book.add(plan, "high", Figures(source="validation", metric=target.name, quality=perfect))
    return ImageServer(
        attentive_pipeline(),
        book,
        limits=Limits(batch=2),
        guard=every,
        fall_back=fall_back,
        lowering="eager",
    )


def jobs_of(server: ImageServer, **changes: object) -> list[Job]:
    wanted = server.wanted(ImageRequest.model_validate(ASK | changes))
    return [Job(each, float("inf")) for each in wanted]


@works_with(
    "Serving",
    "a plan whose images are worse than its tier promises, under `serve --guard --fall-back`",
    "works",
    "found on sampled requests, counted, logged; requests like it then run dense",
)
def test_what_broke_its_promise_runs_dense_from_then_on(
    plans: dict[str, Plan], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_of(tmp_path / "book", plans["medium"], Target.min_ssim(0.9999), 1, True)
    with running(server) as served:
        first = served.ask()
        assert first.headers["x-ditfastattn-plan"] not in ("", "dense")
        planned = alone(attentive_pipeline(), plans["medium"], CALL, 3)
        assert np.array_equal(first.images[0], planned)
        served.wait_for("guard_broken_promises_total", 1)
        assert served.metric("guard_value") < 0.9999
        second = served.ask()
        assert second.headers["x-ditfastattn-plan"] == "dense"
        assert np.array_equal(second.images[0], alone(attentive_pipeline(), None, CALL, 3))
        assert served.metric("dense_fallbacks_total") == 1
        assert served.metric("guard_checks_total") == 1  # nothing planned was made since
    assert "broke the promise of the tier 'high': ssim is" in caplog.text
    assert "seed 3); requests like it run dense" in caplog.text


def test_a_broken_promise_is_reported_and_stays_planned_without_a_fall_back(
    plans: dict[str, Plan], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_of(tmp_path / "book", plans["medium"], Target.min_ssim(0.9999), 2, False)
    checks = []
    for seed in range(4):
        jobs = jobs_of(server, seed=seed)
        made = server.generate(jobs)
        assert made[0].choice.plan == plans["medium"]
        checks.append(server.check(jobs, made))
    assert [found is not None for found in checks] == [False, True, False, True]
    assert all(not found.kept for found in checks if found is not None)
    assert caplog.text.count("broke the promise") == 2
    assert "run dense" not in caplog.text


def test_a_promise_that_is_kept_changes_nothing(
    plans: dict[str, Plan], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    server = server_of(tmp_path / "book", plans["high"], Target.min_ssim(0.2), 3, True)
    jobs = jobs_of(server, n=2)  # of a batch of two, the third image is due in the second
    assert server.check(jobs, server.generate(jobs)) is None
    made = server.generate(jobs)
    found = server.check(jobs, made)
    assert found is not None
    assert (found.tier, found.plan, found.kept) == ("high", made[0].choice.name, True)
    assert 0.2 < found.value < 1.0
    assert "promise" not in caplog.text
    dense = jobs_of(server, quality="lossless")
    assert server.check(dense, server.generate(dense)) is None


def test_a_check_ends_with_the_server(
    plans: dict[str, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = server_of(tmp_path / "book", plans["high"], Target.min_ssim(0.2), 1, False)
    jobs = jobs_of(server)
    made: list[Made] = server.generate(jobs)
    with server._lanes.lane() as lane:
        scheduler = lane.pipeline.scheduler
    own, steps = scheduler.step, []

    def step(*args: object, **kwargs: object) -> object:
        steps.append(1)
        server.close()
        return own(*args, **kwargs)

    monkeypatch.setattr(scheduler, "step", step)
    assert server.check(jobs, made) is None
    assert len(steps) == 1


def test_a_bundle_has_no_guard() -> None:
    with pytest.raises(ConfigError, match=r"guard compares with the dense model(.|\n)*plan book"):
        ImageServer(attentive_pipeline(), None, guard=10)
