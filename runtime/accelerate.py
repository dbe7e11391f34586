"""Run a pipeline's transformer by a plan, in one line, and undo it in another."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch.fx import GraphModule

from ditfastattn.passes.capture.captured_graph import GraphInput
from ditfastattn.passes.capture.dynamo import describe_inputs
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.dynamo_adapter import PlannedFunction
from ditfastattn.runtime.generation import naming_generation
from ditfastattn.runtime.lowering import many_compilations
from ditfastattn.runtime.opaque import OpaqueModel, is_opaque
from ditfastattn.runtime.options import BackendOptions, parse_options
from ditfastattn.runtime.pipeline.denoiser import (
    Forward,
    check_not_hooked,
    denoiser_name,
    plan_forward,
    restore_forward,
    transformer_of,
)
from ditfastattn.runtime.pipeline.guidance import current_guidance
from ditfastattn.runtime.pipeline.sampler import check_sampler

log = logging.getLogger(__name__)


def accelerate(
    pipeline: Any,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    mode: str | None = None,
    **options: Any,
) -> Any:
    """Compile ``pipeline.transformer`` by ``plan``, in place, and return the pipeline.

    The module stays the pipeline's own: only its forward is replaced, beneath offloading hooks.
    A pipeline that is accelerated already gets the new plan. A second transformer, of low-noise
    steps, stays as it is. The scheduler, its config, and the
    guidance scale if the pipeline exposes it, are compared with the plan's as generations begin.

    Args:
        pipeline: a diffusers pipeline with a ``transformer``.
        plan: the plan, or its path; without one the first generation calibrates itself.
        mode: a mode of ``torch.compile``, such as ``"reduce-overhead"``.
        **options: the backend's other options, as ``torch.compile(options=...)`` takes them.

    Raises:
        ConfigError: there is no transformer, or one whose parts are cached or moved while it runs;
            the plan cannot be read, or is for another scheduler.
    """
    where = "accelerate(pipeline)"
    module = transformer_of(pipeline, where)
    loaded = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
    if not is_opaque(loaded):
        check_not_hooked(module)
    scheduler = getattr(pipeline, "scheduler", None)
    if loaded is not None and scheduler is not None:
        check_sampler(loaded, scheduler)
    if getattr(pipeline, "transformer_2", None) is not None:
        log.warning("ditfastattn: transformer_2 runs dense: a plan is of `transformer` alone")
    chosen = parse_options({**options, **({} if loaded is None else {"plan": loaded})}, mode)
    restore(pipeline)
    name = denoiser_name(pipeline)
    around = getattr(pipeline, name)
    setattr(pipeline, name, module)  # a torch.compile around it would compile what runs compiled

    if is_opaque(loaded):
        compiled = getattr(around, "dynamo_ctx", lambda forward: forward)
        plan_forward(module, lambda own: _opaque(compiled(own), module, pipeline, chosen))
    else:
        plan_forward(module, lambda forward: _planned(forward, pipeline, chosen))
    return pipeline


def _backend(graph: GraphModule, _example: Sequence[Any]) -> Callable[..., Any]:
    """Hand the graph's calls to the forward under way.

    Dynamo keeps what it compiles, and every backend, for as long as the class lives; so they hold
    nothing of a model, and serve all models of one structure.
    """
    captured = _DynamoGraph(graph, describe_inputs(graph))

    def run(*args: Any) -> Any:
        return _under_way.get().function(captured)(*args)

    return run


@dataclass(frozen=True, eq=False)
class _DynamoGraph:
    module: GraphModule
    inputs: tuple[GraphInput, ...]


class _PlannedForward:
    """Run the forward of one module, compiled; each call first looks at the pipeline's sampler."""

    def __init__(self, forward: Forward, pipeline: Any, options: BackendOptions) -> None:
        self._compiled: Any = torch.compile(forward, backend=_backend, fullgraph=True)
        self._options = options
        self._sampler = _SamplerWatch(ref(pipeline), options.plan)
        self._functions: WeakKeyDictionary[_DynamoGraph, PlannedFunction] = WeakKeyDictionary()

    def __call__(self, args: Any, kwargs: Any) -> Any:
        with naming_generation(self._sampler.generation()):
            token = _under_way.set(self)
            try:
                with many_compilations():  # models of one class count together
                    return self._compiled(*args, **kwargs)
            finally:
                _under_way.reset(token)

    def function(self, graph: _DynamoGraph) -> PlannedFunction:
        """Return what runs ``graph`` by the plan."""
        if graph not in self._functions:
            made = PlannedFunction(graph.module, self._options, graph.inputs)
            self._functions.setdefault(graph, made)
        return self._functions[graph]


_under_way: ContextVar[_PlannedForward] = ContextVar("ditfastattn_planned_forward")


def _planned(forward: Forward, pipeline: Any, options: BackendOptions) -> Forward:
    planned = _PlannedForward(forward, pipeline, options)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return planned(args, kwargs)

    return run


def _opaque(forward: Forward, module: Any, pipeline: Any, options: BackendOptions) -> Forward:
    assert options.plan is not None
    model = OpaqueModel(module, options.plan, options.timestep)
    sampler = _SamplerWatch(ref(pipeline), options.plan)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with naming_generation(sampler.generation()):
            return model(forward, args, kwargs)

    return run


class _SamplerWatch:
    """Look at a pipeline's sampler before each call of its transformer."""

    def __init__(self, pipeline: ref[Any], plan: Plan | None) -> None:
        self._pipeline, self._plan = pipeline, plan
        self._accepted: list[Any] = [None, None, None]  # compared last, by identity
        self._timesteps: object | None = None  # of the generation under way

    def generation(self) -> object | None:
        """Check the sampler; return what stands for the generation under way, None if unknown.

        Raises:
            ConfigError: the sampler is not the plan's.
        """
        pipeline = self._pipeline()
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is None:
            return None
        timesteps: object | None = getattr(scheduler, "timesteps", None)  # set once a generation
        stable = timesteps is getattr(scheduler, "timesteps", None)
        begins = stable and timesteps is not self._timesteps
        self._timesteps = timesteps if stable else None
        if self._plan is not None:
            self._check(self._plan, scheduler, pipeline, begins)
        return self._timesteps

    def _check(self, plan: Plan, scheduler: Any, pipeline: Any, begins: bool) -> None:
        # The guidance is compared where a generation begins: a pipeline may change it later. A
        # scheduler that counts has no index before a generation's first step.
        if getattr(scheduler, "step_index", None) is not None:
            return
        begins = begins or hasattr(scheduler, "step_index")
        scale = current_guidance(pipeline) if begins else self._accepted[2]
        found = [scheduler, scheduler.config, scale]
        if any(one is not other for one, other in zip(found, self._accepted, strict=True)):
            check_sampler(plan, scheduler, found[2])
            self._accepted[:] = found


def restore(pipeline: Any) -> Any:
    """Undo ``accelerate``: the transformer runs as it did before; return the pipeline.

    A pipeline that is not accelerated is left as it is.

    Raises:
        ConfigError: the pipeline has no transformer.
    """
    module = transformer_of(pipeline, "restore(pipeline)")
    restore_forward(module)
    return pipeline
