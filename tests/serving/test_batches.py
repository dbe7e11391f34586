"""Requests of one plan that are generated together: each image is that of its seed alone."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ditfastattn
from ditfastattn import Plan
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.job import Job, Made
from ditfastattn.serving.limits import Limits
from tests.helpers import attentive_pipeline
from tests.plans import plan_for
from tests.serving.conftest import F, S
from tests.serving.servers import Answer, alone, filled_book, running
from tests.three_steps import CALL
from tests.tiny_pipelines import TINY_PIPELINES
from tests.works_with import works_with

ASKED = {"prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale"}
LEVELS = 1  # of 255, by which an image of a batch may differ from its twin


def ask_together(server: ImageServer, asked: list[dict[str, Any]]) -> list[Answer]:
    with running(server) as served, concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        return [each.result() for each in [pool.submit(served.ask, **one) for one in asked]]


@pytest.mark.slow  # its quicker twin is below
@works_with(
    "Serving",
    "requests of one plan, generated together (`--batch`)",
    "works",
    "each within one of 255 levels of its seed alone; requests of another plan wait",
)
def test_images_of_a_batch_are_those_of_their_seeds_alone(
    book_folder: Path, plans: dict[str, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    server = ImageServer(
        attentive_pipeline(),
        ditfastattn.book(book_folder),
        limits=Limits(batch=4, window=0.5),
        lowering="eager",
    )
    asked: list[dict[str, Any]] = [
        {"prompt": str(seed), "seed": seed, "quality": quality}
        for seed in range(3)
        for quality in ("high", "medium")
    ]
    batches: list[list[Job]] = []
    own = server.generate

    def generate(jobs: Sequence[Job]) -> list[Made]:
        batches.append(list(jobs))
        return own(jobs)

    monkeypatch.setattr(server, "generate", generate)
    answers = ask_together(server, asked)
    for one, answer in zip(asked, answers, strict=True):
        call = CALL | {"class_labels": [one["seed"]]}
        wanted = alone(attentive_pipeline(), plans[one["quality"]], call, one["seed"])
        assert np.abs(answer.images[0] - wanted).max() <= LEVELS
    assert sorted(map(len, batches)) == [3, 3]
    assert all(len({job.wanted.kind for job in batch}) == 1 for batch in batches)


def test_prompts_of_a_batch_are_those_of_their_seeds_alone(tmp_path: Path) -> None:
    make, given = TINY_PIPELINES["pixart"]
    call = {**given, "num_inference_steps": 3}
    plan = plan_for(make(), call, (F, S, S))
    torch._dynamo.reset()
    server = ImageServer(
        make(),
        filled_book(tmp_path / "book", {"high": plan}),
        limits=Limits(batch=2, window=0.5),
        call={name: value for name, value in given.items() if name not in ASKED},
        lowering="eager",
    )
    size = f"{call['width']}x{call['height']}" if "width" in call else "auto"
    guidance = plan.sampler.guidance_scale
    asked: list[dict[str, Any]] = [
        {"prompt": "a cat", "seed": 1, "negative_prompt": "red"},
        {"prompt": "a photo of the dog", "seed": 2},
    ]
    for one in asked:
        one |= {"size": size, "guidance_scale": guidance}
    answers = ask_together(server, asked)
    for one, answer in zip(asked, answers, strict=True):
        assert answer.headers["x-ditfastattn-plan"] != "dense"
        negative = {"negative_prompt": one.get("negative_prompt", "")}
        changed = call | {"prompt": one["prompt"], **negative}
        wanted = alone(make(), plan, changed, one["seed"])
        assert np.abs(answer.images[0] - wanted).max() <= LEVELS


def test_what_may_run_is_compiled_before_it_is_asked_for(
    book_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(batch=2)
    server = ImageServer(attentive_pipeline(), ditfastattn.book(book_folder), limits=limits)
    compiled: list[tuple[str, int]] = []

    def generate(jobs: Sequence[Job]) -> list[Made]:
        compiled.append((jobs[0].wanted.kind.tier, len(jobs)))
        return []

    monkeypatch.setattr(server, "generate", generate)
    server.warm_up()
    tiers = ("lossless", "high", "medium")
    assert compiled == [(tier, batch) for tier in tiers for batch in (1, 2)]
