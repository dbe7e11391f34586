"""Measure what running a compiled step costs besides its regions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch import Tensor

from ditfastattn.runtime.lowering import OutlinedStep
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.runtime.search.measure.timing import summarize

_RUN = OutlinedStep.__call__


def dispatch_seconds(step: OutlinedStep, args: Sequence[Tensor]) -> float:
    """Return the median time of ``step`` with regions that only return a stored result."""
    empty = emptied(step, args)
    return summarize([seconds(lambda: empty(args)) for _ in range(1000)]).median


def emptied(step: OutlinedStep, args: Sequence[Tensor]) -> OutlinedStep:
    """Run ``step`` once; return it with regions that only return the result of that run."""
    results: list[Any] = []

    def recorded(region: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> Any:
            results.append(region(*inputs))
            return results[-1]

        return run

    def ready(result: Any) -> Callable[..., Any]:
        return lambda *_: result

    _RUN(
        replace(step, calls=tuple(replace(call, run=recorded(call.run)) for call in step.calls)),
        args,
    )
    paired = zip(step.calls, results, strict=True)
    return replace(step, calls=tuple(replace(call, run=ready(result)) for call, result in paired))


class EmptiedSteps:
    """Run work with all steps emptied of their regions."""

    def __init__(self) -> None:
        """Begin with no step."""
        self._steps: dict[int, OutlinedStep] = {}

    def __len__(self) -> int:
        """Return how many distinct steps have run."""
        return len(self._steps)

    def run(self, work: Callable[[int], None]) -> None:
        """Do ``work`` with emptied steps."""

        def run_empty(step: OutlinedStep, args: Sequence[Tensor]) -> list[Any]:
            if id(step) not in self._steps:
                self._steps[id(step)] = emptied(step, args)
            return _RUN(self._steps[id(step)], args)

        with patch.object(OutlinedStep, "__call__", run_empty):
            work(0)


def recorded_calls(pipeline: Any, prompt: Prompt) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments of the model's calls in a dense generation."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    hook = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        generate(pipeline, prompt)
    finally:
        hook.remove()
    return calls


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
