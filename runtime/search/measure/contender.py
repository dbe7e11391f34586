"""Contenders: a pipeline with its transformer compiled one way, to be timed against another."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.opaque import OpaqueModel, is_opaque
from ditfastattn.runtime.pipeline.denoiser import denoiser_name, transformer_of
from ditfastattn.runtime.pipeline.forwards import replace_forward
from ditfastattn.runtime.pipeline.prompts import Prompt, as_images, generate
from ditfastattn.runtime.search.measure.timing import PairedTiming, measure_pairs


class Contender:
    """Generate with ``transformer`` in place of the pipeline's own; keep images by number."""

    def __init__(self, pipeline: Any, transformer: Any, prompts: Sequence[Prompt]) -> None:
        """Take the prompts; generation ``k`` is of prompt ``k`` modulo their number."""
        self._pipeline, self._transformer, self._prompts = pipeline, transformer, prompts
        self._name = denoiser_name(pipeline)
        self._original = getattr(pipeline, self._name)
        self.images: dict[int, Tensor] = {}

    def warm_up(self) -> float:
        """Compile; return the seconds it took, a first generation included."""
        began = time.perf_counter()
        self.generate(0)
        self.generate(0)
        return time.perf_counter() - began

    def generate(self, number: int) -> None:
        """Generate once."""
        prompt = self._prompts[number % len(self._prompts)]
        setattr(self._pipeline, self._name, self._transformer)
        try:
            self.images[number] = as_images(generate(self._pipeline, prompt))
        finally:
            setattr(self._pipeline, self._name, self._original)

    def by_prompt(self) -> list[Tensor]:
        """Return the images of each prompt, generated unless they have been."""
        for number in range(len(self._prompts)):
            if number not in self.images:
                self.generate(number)
        return [self.images[number] for number in range(len(self._prompts))]

    def stacked(self) -> Tensor:
        """Return the images of generations 0, 1, ... as ``[B, C, H, W]``."""
        return torch.cat([self.images[key] for key in sorted(self.images)])


def dense_contender(pipeline: Any, prompts: Sequence[Prompt], lowering: Lowering) -> Contender:
    """Return the baseline: the model compiled by Inductor, or not compiled for ``eager``."""
    model = getattr(pipeline, denoiser_name(pipeline))
    if Lowering(lowering) is Lowering.INDUCTOR:  # a caller may have passed its name
        model = torch.compile(model, fullgraph=True, dynamic=False)
    return Contender(pipeline, model, prompts)


def planned_contender(
    pipeline: Any,
    plan: Plan,
    prompts: Sequence[Prompt],
    lowering: Lowering,
    timestep: str = "timestep",
    inductor: Mapping[str, Any] | None = None,
) -> Contender:
    """Return the model run by ``plan``; one that is not captured is called as it is.

    ``inductor`` holds Inductor's own options.
    """
    if is_opaque(plan):
        return _OpaqueContender(pipeline, plan, prompts, timestep)
    options: dict[str, Any] = {"plan": plan, "lowering": lowering, "timestep": timestep}
    options["inductor"] = dict(inductor or {})
    model = torch.compile(
        pipeline.transformer, backend="ditfastattn", fullgraph=True, options=options, dynamic=False
    )
    return Contender(pipeline, model, prompts)


class _OpaqueContender(Contender):
    """Generate with the pipeline's own denoiser, which runs at some steps only."""

    def __init__(self, pipeline: Any, plan: Plan, prompts: Sequence[Prompt], timestep: str) -> None:
        module = transformer_of(pipeline, "a generation")
        super().__init__(pipeline, getattr(pipeline, denoiser_name(pipeline)), prompts)
        self._module, self._model = module, OpaqueModel(module, plan, timestep)

    def generate(self, number: int) -> None:
        undo = replace_forward(self._module, self._model.around)
        try:
            super().generate(number)
        finally:
            undo()


def measure_speed(
    pipeline: Any,
    plan: Plan,
    prompts: Sequence[Prompt],
    lowering: Lowering,
    repetitions: int,
    timestep: str = "timestep",
) -> PairedTiming:
    """Time generations dense and planned, both compiled and warm, in turns."""
    dense = dense_contender(pipeline, prompts, lowering)
    planned = planned_contender(pipeline, plan, prompts, lowering, timestep)
    with many_compilations():
        dense.warm_up()
        planned.warm_up()
    return measure_pairs(dense.generate, planned.generate, repetitions)
