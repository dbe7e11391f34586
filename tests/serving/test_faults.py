"""Clients that go, requests that are late, queues that are full, and numbers that are none."""

from __future__ import annotations

import concurrent.futures
import gc
import json
import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ditfastattn
from ditfastattn import ConfigError, Plan
from ditfastattn.runtime.caches import Caches
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.job import Job
from ditfastattn.serving.limits import Limits
from ditfastattn.serving.pipeline import NotFiniteError
from ditfastattn.serving.request import ImageRequest
from tests.helpers import attentive_pipeline
from tests.serving.servers import ASK, Running, alone, running
from tests.three_steps import CALL
from tests.tiers import slow_but
from tests.works_with import works_with


class Slow:
    """A pipeline whose scheduler steps slowly, and counts."""

    def __init__(self, seconds: float = 0.1) -> None:
        self.pipeline, self.steps = attentive_pipeline(), 0
        own = self.pipeline.scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            time.sleep(seconds)
            return own(*args, **kwargs)

        self.pipeline.scheduler.step = step


@contextmanager
def serving(slow: Any, folder: Path, **limits: Any) -> Generator[Running]:
    torch._dynamo.reset()
    server = ImageServer(
        slow, ditfastattn.book(folder), name="digits", limits=Limits(**limits), lowering="eager"
    )
    with running(server) as found:
        yield found


def held_caches() -> int:
    gc.collect()
    return sum(each.bytes for each in gc.get_objects() if type(each) is Caches)


@pytest.mark.slow
@works_with(
    "Serving",
    "a client that goes while its image is generated",
    "works",
    "the generation stops at the next step and its caches are freed; the next image is right",
)
def test_a_client_that_goes_ends_its_generation(book_folder: Path, plans: dict[str, Plan]) -> None:
    before = held_caches()
    slow = Slow()
    with serving(slow.pipeline, book_folder) as served:
        body = json.dumps(ASK | {"num_inference_steps": 60}).encode()
        connection = served.connect(body)
        served.wait_for("generating_images", 1)
        connection.close()
        served.wait_for("generating_images", 0)
        assert slow.steps < 40
        assert served.metric("stopped_total") == 1
        found = served.ask().images[0]
        assert held_caches() == before
    assert np.array_equal(found, alone(attentive_pipeline(), plans["high"], CALL, 3))


def test_a_late_request_ends_at_the_next_step(book_folder: Path) -> None:
    slow = Slow()
    with serving(slow.pipeline, book_folder, seconds=0.5) as served:
        began = time.monotonic()
        found = served.ask(num_inference_steps=60)
        assert (found.status, found.error["code"]) == (504, "timeout")
        assert time.monotonic() - began < 3
        served.wait_for("generating_images", 0)
        assert slow.steps < 40
        assert served.ask(num_inference_steps=1).status == 200


def test_a_full_queue_says_when_to_come_again(book_folder: Path) -> None:
    with (
        serving(Slow().pipeline, book_folder, queue=1, images=1) as served,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        answers = list(pool.map(lambda _: served.ask(), range(8)))
    refused = [each for each in answers if each.status != 200]
    assert 0 < len(refused) < 8
    for each in refused:
        assert (each.status, each.error["code"]) == (503, "queue_full")
        assert int(each.headers["retry-after"]) >= 1


def test_what_was_accepted_is_finished_as_the_server_ends(
    book_folder: Path, plans: dict[str, Plan]
) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with serving(Slow().pipeline, book_folder) as served:
            answers = [pool.submit(served.ask, seed=seed) for seed in (3, 4)]
            served.wait_for("generating_images", 1)
            served.wait_for("queue_images", 1)
        for seed, answer in zip((3, 4), answers, strict=True):
            (image,) = answer.result().images
            assert np.array_equal(image, alone(attentive_pipeline(), plans["high"], CALL, seed))


@pytest.mark.parametrize("value", slow_but([float("inf")], [float("inf"), float("nan")]))
def test_latents_that_are_not_finite_are_not_served(
    value: float, book_folder: Path, plans: dict[str, Plan]
) -> None:
    pipeline = attentive_pipeline()
    own, broken = pipeline.scheduler.step, [True]

    def step(*args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        if broken:
            result.prev_sample[0, 0, 0, 0] = value
        return result

    pipeline.scheduler.step = step
    with serving(pipeline, book_folder) as served:
        found = served.ask()
        assert (found.status, found.error["code"]) == (500, "not_finite")
        assert served.metric("not_finite_total") == 1
        broken.clear()
        (image,) = served.ask().images
    assert np.array_equal(image, alone(attentive_pipeline(), plans["high"], CALL, 3))


def test_an_infinity_that_the_sampler_clips_is_not_served(book_folder: Path) -> None:
    """What caches hold reaches the image through the model's output alone."""
    pipeline = attentive_pipeline()
    own, calls = pipeline.scheduler.step, [0]

    def step(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return own(output.clamp(-1, 1), *args, **kwargs)

    def forward(_module: Any, _args: Any, result: Any) -> None:
        if calls[0] == 1:
            result[0][0, 0, 0, 0] = float("inf")

    pipeline.scheduler.step = step
    pipeline.transformer.register_forward_hook(forward)
    server = ImageServer(pipeline, ditfastattn.book(book_folder), lowering="eager")
    (wanted,) = server.wanted(ImageRequest.model_validate(ASK))
    with pytest.raises(NotFiniteError, match="values of step 1 of 3 are not finite"):
        server.generate([Job(wanted, math.inf)])


@pytest.mark.slow  # the twin of latents that are not finite
def test_out_of_memory_in_a_step_fails_one_request(
    book_folder: Path, plans: dict[str, Plan]
) -> None:
    pipeline = attentive_pipeline()
    own, broken = pipeline.scheduler.step, [True]

    def step(*args: Any, **kwargs: Any) -> Any:
        if broken:
            raise torch.OutOfMemoryError("secret detail")
        return own(*args, **kwargs)

    pipeline.scheduler.step = step
    with serving(pipeline, book_folder) as served:
        before = held_caches()
        found = served.ask()
        assert (found.status, found.error["code"]) == (503, "out_of_memory")
        assert "smaller size" in found.error["message"]
        assert b"secret" not in found.content
        assert held_caches() == before
        broken.clear()
        (image,) = served.ask().images
    assert np.array_equal(image, alone(attentive_pipeline(), plans["high"], CALL, 3))


@pytest.mark.slow  # a twin of what a pipeline refuses without a server
def test_a_mismatch_is_refused_where_that_is_chosen(book_folder: Path) -> None:
    torch._dynamo.reset()
    server = ImageServer(
        attentive_pipeline(), ditfastattn.book(book_folder), on_mismatch="error", lowering="eager"
    )
    with running(server) as served:
        found = served.ask(num_inference_steps=4)
        assert (found.status, found.error["code"]) == (400, "no_plan")
        assert "sampler.steps" in found.error["message"]
        assert served.ask().status == 200


@pytest.mark.parametrize("name", ["seed", "generator"])
def test_arguments_that_are_not_of_all_requests_are_refused(book_folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"serve\(call\)[\s\S]*{name}"):
        ImageServer(attentive_pipeline(), ditfastattn.book(book_folder), call={name: 1})


def test_a_pipeline_of_video_is_not_served(book_folder: Path) -> None:
    from tests.tiny_pipelines import tiny_ltx_pipeline

    with pytest.raises(ConfigError, match="makes images of prompts or classes"):
        ImageServer(tiny_ltx_pipeline(), ditfastattn.book(book_folder))


@pytest.mark.parametrize("limits", [{"queue": 0}, {"queue": 3}, {"seconds": -1}])
def test_limits_that_cannot_be_met_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Limits"):
        Limits(**limits)
