"""Generations under way at once, which take turns step by step: each image is its seed's own."""

from __future__ import annotations

import asyncio
import base64
import gc
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pag.pipeline_pag_pixart_sigma import PixArtSigmaPAGPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

import ditfastattn
from ditfastattn import ConfigError, Plan
from ditfastattn.runtime.caches import Caches
from ditfastattn.runtime.pipeline.copies import copied_pipeline
from ditfastattn.runtime.specializations import reports
from ditfastattn.serving.dispatcher import Dispatcher
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.job import Job, Made, StoppedError
from ditfastattn.serving.limits import Limits
from ditfastattn.serving.pipeline import NotFiniteError
from ditfastattn.serving.request import ImageRequest
from ditfastattn.serving.turns import Turns
from tests.helpers import attentive_pipeline
from tests.serving.servers import ASK, alone, pixels, running
from tests.three_steps import CALL
from tests.tiny_pipelines import TINY_PIPELINES
from tests.works_with import works_with

OnStep = Callable[[int, int], None]


def server_of(
    folder: Path, limits: int | Limits, pipeline: Any = None, **given: Any
) -> ImageServer:
    torch._dynamo.reset()
    return ImageServer(
        attentive_pipeline() if pipeline is None else pipeline,
        ditfastattn.book(folder),
        limits=Limits(turns=limits) if isinstance(limits, int) else limits,
        lowering="eager",
        **given,
    )


def job_of(server: ImageServer, **changes: Any) -> Job:
    (wanted,) = server.wanted(ImageRequest.model_validate(ASK | changes))
    return Job(wanted, math.inf)


def wait_until(found: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end
        time.sleep(0.001)


class Together:
    """Run jobs through a dispatcher: the first, and the others once it has made a step."""

    def __init__(self, server: ImageServer, jobs: Sequence[Job]) -> None:
        self._server, self._jobs = server, jobs
        self.steps: list[int] = []  # which job each step was of
        self.ended: list[int] = []  # which job was done when
        for index, job in enumerate(jobs):
            job.on_step = self._note(index, job.on_step)
        self.results = asyncio.run(self._run())

    def _note(self, index: int, own: OnStep) -> OnStep:
        def note(step: int, steps: int) -> None:
            self.steps.append(index)
            if index == 0 and step == 1:
                self._begin_others()
            own(step, steps)

        return note

    def _begin_others(self) -> None:
        """Return once the others wait: for their turn, or in the queue."""
        self._loop.call_soon_threadsafe(self._submit, range(1, len(self._jobs)))
        free = self._server.limits.turns - 1
        turns = self._server._lanes.turns
        wait_until(lambda: len(turns._waiting) >= min(free, len(self._jobs) - 1))
        wait_until(lambda: len(self._futures) == len(self._jobs))

    def _submit(self, indices: Sequence[int]) -> None:
        for index in indices:
            (future,) = self._dispatcher.submit([self._jobs[index]])
            future.add_done_callback(partial(self._end, index))
            self._futures.append(future)

    def _end(self, index: int, _future: asyncio.Future[Made]) -> None:
        self.ended.append(index)

    async def _run(self) -> list[Any]:
        self._loop, self._futures = asyncio.get_running_loop(), list[asyncio.Future[Made]]()
        dispatcher = Dispatcher(self._server.generate, self._server.limits, lambda *_: None)
        self._dispatcher = dispatcher
        run = asyncio.create_task(dispatcher.run())
        self._submit([0])
        await asyncio.wait(self._futures, timeout=60)
        await dispatcher.drain(60)
        assert (dispatcher.generating, dispatcher.waiting) == (0, 0)
        found = await asyncio.gather(*self._futures, return_exceptions=True)
        run.cancel()
        dispatcher.close()
        return found


def image_of(made: Made) -> Any:
    return pixels(base64.b64encode(made.png).decode())


@works_with(
    "Serving",
    "a short request that arrives while a long one is generated (`--turns`)",
    "works",
    "they take turns step by step, and the short one ends first; each image is that of its seed "
    "alone, bit for bit",
)
@pytest.mark.parametrize("turns", [1, 2])
def test_a_short_request_ends_first_where_turns_are_taken(
    turns: int, book_folder: Path, plans: dict[str, Plan]
) -> None:
    server = server_of(book_folder, turns)
    long = job_of(server, quality="lossless", num_inference_steps=9)
    short = job_of(server, quality="medium", seed=4)
    found = Together(server, [long, short])
    if turns == 2:
        assert found.steps == [0, 1] * 3 + [0] * 6
        assert found.ended == [1, 0]
    else:
        assert found.steps == [0] * 9 + [1] * 3
        assert found.ended == [0, 1]
    first, second = map(image_of, found.results)
    call = CALL | {"num_inference_steps": 9}
    assert np.array_equal(first, alone(attentive_pipeline(), None, call, 3))
    assert np.array_equal(second, alone(attentive_pipeline(), plans["medium"], CALL, 4))


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_mixed_tiers_steps_and_guidance_in_turns(kind: Any, book_folder: Path) -> None:
    """A plan, dense for its tier, dense for want of a plan, without guidance: all at once."""

    def pipeline() -> Any:
        made: Any = attentive_pipeline()
        made.scheduler = kind.from_config(made.scheduler.config)
        return made

    asked: list[dict[str, Any]] = [
        {"prompt": "1", "quality": "high"},
        {"prompt": "2", "quality": "medium"},
        {"prompt": "3", "quality": "lossless", "num_inference_steps": 7},
        {"prompt": "4", "quality": "high", "guidance_scale": 1.0, "num_inference_steps": 4},
        {"prompt": "5", "quality": "high", "guidance_scale": 3.0},
        {"prompt": "6", "quality": "medium"},
    ]
    one, several = (server_of(book_folder, turns, pipeline()) for turns in (1, 3))
    wanted = [one.generate([job_of(one, **each)])[0] for each in asked]
    found = Together(several, [job_of(several, **each) for each in asked])
    assert found.steps[:4] == [0, 1, 2, 0]
    planned = kind is DDIMScheduler
    for expected, made in zip(wanted, found.results, strict=True):
        assert isinstance(made, Made)
        assert np.array_equal(image_of(made), image_of(expected))
        assert made.choice.name == expected.choice.name
    assert sum(bool(made.choice.name) for made in found.results) == (3 if planned else 0)


def test_what_is_given_up_while_it_waits_for_its_turn_ends_there(
    book_folder: Path, plans: dict[str, Plan]
) -> None:
    def held() -> int:
        gc.collect()
        return sum(each.bytes for each in gc.get_objects() if type(each) is Caches)

    before = held()
    server = server_of(book_folder, 2)
    turns = server._lanes.turns
    stays, goes = job_of(server), job_of(server, quality="medium")

    def cancel(step: int, _steps: int) -> None:
        if step == 2:  # the other one has made a step, and waits
            goes.cancelled = True
            wait_until(lambda: not turns.awaited)

    stays.on_step = cancel
    found = Together(server, [stays, goes])
    assert found.steps == [0, 1, 0, 0]
    made, stopped = found.results
    assert isinstance(stopped, StoppedError)
    assert np.array_equal(image_of(made), alone(attentive_pipeline(), plans["high"], CALL, 3))
    del found, stopped
    assert held() == before


@pytest.mark.parametrize("error", [NotFiniteError, RuntimeError])
def test_a_generation_that_fails_leaves_the_other_one_right(
    error: type[Exception], book_folder: Path, plans: dict[str, Plan]
) -> None:
    pipeline: Any = attentive_pipeline()
    server = server_of(book_folder, 2, pipeline)
    stays, fails = job_of(server), job_of(server, prompt="7")

    def spoil(_module: Any, _args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if int(kwargs["class_labels"][0]) == 7:
            result[0][0, 0, 0, 0] = math.nan

    def fail(step: int, _steps: int) -> None:
        if step == 2:
            raise RuntimeError

    if error is NotFiniteError:
        pipeline.transformer.register_forward_hook(spoil, with_kwargs=True)
    else:
        fails.on_step = fail
    found = Together(server, [stays, fails])
    assert isinstance(found.results[1], error)
    wanted = alone(attentive_pipeline(), plans["high"], CALL, 3)
    assert np.array_equal(image_of(found.results[0]), wanted)
    again = server.generate([job_of(server)])[0]
    assert np.array_equal(image_of(again), wanted)


def test_requests_in_turns_over_http(book_folder: Path, plans: dict[str, Plan]) -> None:
    seeds = range(4)
    with (
        running(server_of(book_folder, Limits(turns=2, batch=2))) as served,
        ThreadPoolExecutor(len(seeds)) as pool,
    ):
        answers = list(pool.map(lambda seed: served.ask(seed=seed), seeds))
        served.wait_for("generating_images", 0)
        most = max(each.peak_cache_bytes for each in reports() if each.plan == plans["high"])
        assert served.metric("cache_bytes") == 2 * most
        assert most > 0
    for seed, answer in zip(seeds, answers, strict=True):
        wanted = alone(attentive_pipeline(), plans["high"], CALL, seed)
        assert np.abs(answer.images[0] - wanted).max() <= 1


def test_a_check_of_the_guard_waits_for_its_turn(book_folder: Path) -> None:
    server = server_of(book_folder, 2, guard=1)
    job, turns = job_of(server), server._lanes.turns
    made = server.generate([job])
    with ThreadPoolExecutor(1) as pool:
        with turns.turn():
            check = pool.submit(server.check, [job], made)
            wait_until(lambda: turns.awaited)
            assert not check.done()
        found = check.result(60)
    assert found is not None
    assert found.tier == "high"


def test_turns_are_of_the_order_of_arrival() -> None:
    turns, order = Turns(), list[str]()

    def take(name: str) -> None:
        with turns.turn() as turn:
            order.append(name)
            turn.hand_on()
            order.append(name)

    def waits(place: int) -> bool:
        return len(turns._waiting) == place

    threads: list[threading.Thread] = []
    with turns.turn() as held:
        for place, name in enumerate("ab", 1):
            threads.append(threading.Thread(target=take, args=(name,)))
            threads[-1].start()
            wait_until(partial(waits, place))
        held.hand_on()
        order.append("held")
    for thread in threads:
        thread.join(60)
    assert order == ["a", "b", "held", "a", "b"]
    assert not turns.awaited


def test_lanes_share_models_and_nothing_of_a_generation() -> None:
    pipeline: Any = TINY_PIPELINES["pixart"][0]()
    made = copied_pipeline(pipeline)
    assert made.transformer is pipeline.transformer
    assert made.scheduler is not pipeline.scheduler
    made.scheduler.set_timesteps(3)
    made._guidance_scale = 7.0
    assert pipeline.scheduler.num_inference_steps != 3
    assert getattr(pipeline, "_guidance_scale", None) != 7.0


@pytest.mark.parametrize("turns", [1, 2])
def test_attention_processors_that_a_generation_replaces_are_put_back(
    turns: int, book_folder: Path
) -> None:
    """Perturbed-attention guidance puts its own in place for as long as a call lasts."""
    plain, given = TINY_PIPELINES["pixart"]
    kind: Any = PixArtSigmaPAGPipeline
    pipeline = kind(**plain().components, pag_applied_layers="blocks.0")
    server = server_of(book_folder, turns, pipeline, call={"use_resolution_binning": False})
    before = pipeline.transformer.attn_processors
    size = f"{given['width']}x{given['height']}"
    job = job_of(server, prompt="a cat", quality="lossless", size=size)
    job.on_step = lambda *_: setattr(job, "cancelled", turns == 1)
    reason = "replaces attention processors while it generates"
    with pytest.raises(ConfigError if turns == 2 else StoppedError) as found:
        server.generate([job, job])
    assert (reason in str(found.value)) == (turns == 2)
    assert pipeline.transformer.attn_processors == before


def replaced_step() -> Any:
    pipeline: Any = attentive_pipeline()
    pipeline.scheduler.step = pipeline.scheduler.step
    return pipeline


def offloaded() -> Any:
    pipeline: Any = attentive_pipeline()
    pipeline._all_hooks = ["a hook of the transformer"]  # as enable_model_cpu_offload() leaves it
    return pipeline


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (offloaded, {}, r"moves its models to the CPU(.|\n)*enable_model_cpu_offload"),
        (replaced_step, {}, r"DDIMScheduler: a method was replaced(.|\n)*step = "),
        (attentive_pipeline, {"mode": "reduce-overhead"}, r"CUDA graphs(.|\n)*turns=1"),
    ],
)
def test_what_cannot_take_turns_is_refused(
    make: Callable[[], Any], options: dict[str, Any], reason: str, book_folder: Path
) -> None:
    book = ditfastattn.book(book_folder)
    with pytest.raises(ConfigError, match=reason):
        ImageServer(make(), book, limits=Limits(turns=2), **options)
    ImageServer(make(), book, **options)  # one generation at a time
