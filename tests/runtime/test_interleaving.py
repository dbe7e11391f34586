"""Generations on one thread, in turns: each is its own, or it is refused; they are never mixed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

import ditfastattn
from ditfastattn import CfgLayout, ConfigError
from tests.helpers import largest_difference, tiny_dit
from tests.requests import (
    KINDS,
    Holder,
    Request,
    Served,
    served_model,
    take_turns,
    uniform_plan,
)
from tests.works_with import works_with

OTHERS: dict[str, Any] = {
    "seed": {"seed": 2},
    "prompt": {"label": 4},
    "seed and prompt": {"seed": 2, "label": 4},
}


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Request]]:
    """Return a model that runs by a plan, and a request that is the plan's."""
    kind, layout = request.param
    yield (
        served_model(kind, uniform_plan(CfgLayout(layout)), tmp_path_factory.mktemp("bundle")),
        Request(1, 1, CfgLayout(layout)),
    )
    ditfastattn.restore(Holder(tiny_dit().model))


def assert_never_mixed(found: Served, expected: list[Tensor]) -> None:
    """Assert that a request got its own outputs, all of them or the first ones."""
    difference = largest_difference(found.outputs, expected[: len(found.outputs)])
    assert difference < 1e-6
    assert (found.refused is None) == (len(found.outputs) == len(expected))


@works_with(
    "Generations in turns",
    "generations in turns on one thread, call by call or step by step, without a context",
    "refused",
    "as far as latents and conditions show; see `ditfastattn.generation`",
)
@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("other", OTHERS)
def test_generations_in_turns_are_not_mixed(
    model: tuple[Any, Request], other: str, calls: int
) -> None:
    run, first = model
    requests = [first, replace(first, **OTHERS[other])]
    expected = [request.run(run) for request in requests]
    found = take_turns([request.calls(run) for request in requests], calls=calls)
    for served, wanted in zip(found, expected, strict=True):
        assert_never_mixed(served, wanted)
    assert any("ditfastattn.generation()" in str(served.refused) for served in found)
    assert largest_difference(first.run(run), expected[0]) == 0.0


@pytest.mark.parametrize("eta", [0.3, 0.6])
def test_a_sampler_that_adds_noise_does_not_hide_turns(
    model: tuple[Any, Request], eta: float
) -> None:
    run, first = model
    requests = [replace(first, eta=eta), replace(first, seed=2, eta=eta)]
    expected = [request.run(run) for request in requests]
    found = take_turns([request.calls(run) for request in requests], calls=first.layout.calls)
    for served, wanted in zip(found, expected, strict=True):
        assert_never_mixed(served, wanted)
    assert any(served.refused for served in found)


def test_the_generation_that_began_last_goes_on_where_another_is_refused(
    model: tuple[Any, Request],
) -> None:
    run, first = model
    second = replace(first, seed=2, label=4)
    expected = second.run(run)
    left, going = first.calls(run), second.calls(run)
    calls = first.layout.calls
    for _ in range(calls):
        next(left)
    outputs = [next(going) for _ in range(calls)]
    with pytest.raises(ConfigError, match="taken the place of"):
        next(left)
    assert largest_difference([*outputs, *going], expected) == 0.0


@works_with(
    "Generations in turns",
    "generations in turns, each within its `ditfastattn.generation()`",
    "works",
    "exact",
)
@pytest.mark.parametrize("calls", [1, 2])
def test_contexts_keep_generations_in_turns_apart(model: tuple[Any, Request], calls: int) -> None:
    run, first = model
    requests = [replace(first, seed=seed, label=seed % 2) for seed in range(3)]
    expected = [request.run(run) for request in requests]
    contexts = [ditfastattn.generation() for _ in requests]
    found = take_turns([request.calls(run) for request in requests], contexts.__getitem__, calls)
    for served, wanted in zip(found, expected, strict=True):
        assert served.refused is None
        assert largest_difference(served.outputs, wanted) == 0.0


@works_with(
    "Generations in turns",
    "tasks of asyncio, and steps on changing threads, within `ditfastattn.generation()`",
    "works",
    "exact; one thread at a time",
)
def test_a_context_serves_tasks_of_asyncio_and_moves_between_threads(
    model: tuple[Any, Request],
) -> None:
    run, first = model
    requests = [first, replace(first, seed=2, label=4)]
    expected = [request.run(run) for request in requests]

    async def generate(request: Request) -> list[Tensor]:
        found: list[Tensor] = []
        calls = request.calls(run)
        with ditfastattn.generation():
            for _ in range(len(first.timesteps) * first.layout.calls):
                found.append(await asyncio.to_thread(next, calls))
        return found

    async def both() -> list[list[Tensor]]:
        return await asyncio.gather(*map(generate, requests))

    found = asyncio.run(both())
    for outputs, wanted in zip(found, expected, strict=True):
        assert largest_difference(outputs, wanted) == 0.0


def test_a_context_may_serve_one_generation_after_another(model: tuple[Any, Request]) -> None:
    run, first = model
    requests = [first, replace(first, seed=2)]
    expected = [request.run(run) for request in requests]
    with ditfastattn.generation():
        for request, wanted in zip(requests, expected, strict=True):
            assert largest_difference(request.run(run), wanted) == 0.0
        begun = first.calls(run)
        next(begun)
    assert largest_difference(first.run(run), expected[0]) == 0.0  # of the thread's own
