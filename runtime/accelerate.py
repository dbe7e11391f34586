"""Run a pipeline's transformer by a plan, in one line, and undo it in another."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.fx import GraphModule

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.capture.captured_graph import GraphInput
from ditfastattn.passes.capture.dynamo import describe_inputs
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.dynamo_adapter import PlannedFunction
from ditfastattn.runtime.generation import naming_generation
from ditfastattn.runtime.lowering import many_compilations
from ditfastattn.runtime.opaque import OpaqueModel, is_opaque
from ditfastattn.runtime.options import BackendOptions, parse_options
from ditfastattn.runtime.pipeline.caller import calling_pipeline, describe_call
from ditfastattn.runtime.pipeline.compilation import Compilation, give_back, set_aside
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.pipeline.forwards import Forward, plan_forward, restore_forward
from ditfastattn.runtime.pipeline.generation_end import stop_watching, warn_if_unused
from ditfastattn.runtime.pipeline.guidance import current_guidance
from ditfastattn.runtime.pipeline.hooks import check_not_cached, check_parts_not_hooked
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
    scheduler = getattr(pipeline, "scheduler", None)
    if loaded is not None and scheduler is not None:
        check_sampler(loaded, scheduler)
    if getattr(pipeline, "transformer_2", None) is not None:
        log.warning("ditfastattn: transformer_2 runs dense: a plan is of `transformer` alone")
    chosen = parse_options({**options, **({} if loaded is None else {"plan": loaded})}, mode)
    _check_hooks(module, loaded)
    restore(pipeline)
    whole = loaded if is_opaque(loaded) else None
    model = None if whole is None else OpaqueModel(module, whole, chosen.timestep)
    compilation = set_aside(module)
    compilation.take_from(pipeline, module)
    watch = _PipelineWatch(ref(pipeline), ref(module), loaded, compilation)
    if model is not None:
        plan_forward(module, lambda own: _opaque(own, model, compilation, watch))
    else:
        plan_forward(module, lambda own: _planned(own, chosen, watch))
    warn_if_unused(pipeline, module, lambda: watch.calls)
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

    def __init__(self, forward: Forward, options: BackendOptions, watch: _PipelineWatch) -> None:
        self._compiled: Any = torch.compile(forward, backend=_backend, fullgraph=True)
        self._options, self._watch = options, watch
        self._functions: WeakKeyDictionary[_DynamoGraph, PlannedFunction] = WeakKeyDictionary()

    def __call__(self, args: Any, kwargs: Any) -> Any:
        with self._watch.call():
            token = _under_way.set(self)
            try:
                with many_compilations():  # models of one class count together
                    return self._compiled(*args, **kwargs)
            except FailOnRecompileLimitHit as error:
                raise _too_many() from error
            except TorchDynamoException:
                self._watch.check_hooks()  # a better reason, if that is one
                raise
            finally:
                _under_way.reset(token)

    def function(self, graph: _DynamoGraph) -> PlannedFunction:
        """Return what runs ``graph`` by the plan."""
        if graph not in self._functions:
            made = PlannedFunction(graph.module, self._options, graph.inputs)
            self._functions.setdefault(graph, made)
        return self._functions[graph]


_under_way: ContextVar[_PlannedForward] = ContextVar("ditfastattn_planned_forward")


def _planned(forward: Forward, options: BackendOptions, watch: _PipelineWatch) -> Forward:
    planned = _PlannedForward(forward, options, watch)
    return lambda *args, **kwargs: planned(args, kwargs)


def _opaque(
    forward: Forward, model: OpaqueModel, compilation: Compilation, watch: _PipelineWatch
) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        with watch.call():
            return model(compilation.of(forward), args, kwargs)

    return run


class _PipelineWatch:
    """Look at the pipeline that calls a transformer, and at its sampler, before each call."""

    def __init__(
        self,
        pipeline: ref[Any],
        module: ref[nn.Module],
        plan: Plan | None,
        compilation: Compilation,
    ) -> None:
        self._pipeline, self._module, self._plan = pipeline, module, plan
        self._compilation = compilation
        self.calls = 0
        self._accepted: list[Any] = [None, None, None]  # compared last, by identity
        self._timesteps: object | None = None  # of the generation under way

    @contextmanager
    def call(self) -> Generator[None]:
        """Check the sampler of the pipeline that calls; the call runs within.

        Raises:
            ConfigError: the sampler is not the plan's.
        """
        self.calls += 1
        module, own = self._module(), self._pipeline()
        caller = None if module is None else calling_pipeline(module)
        if module is not None and caller is not None:
            self._compilation.take_from(caller, module)
        try:
            with naming_generation(self._generation(own if caller is None else caller)):
                yield
        except ConfigError as error:
            call = "" if module is None or caller is None else describe_call(module)
            explained = _explained(error, call, caller is not own)
            if explained is None:
                raise
            raise explained from error

    def check_hooks(self) -> None:
        """Raise ``ConfigError`` if hooks have come since that the plan cannot run with."""
        module = self._module()
        if module is not None:
            _check_hooks(module, self._plan)

    def _generation(self, pipeline: Any) -> object | None:
        """Check the sampler; return what stands for the generation under way, None if unknown."""
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is None:
            return None
        timesteps: object | None = getattr(scheduler, "timesteps", None)  # set once a generation
        stable = timesteps is getattr(scheduler, "timesteps", None)
        begins = stable and timesteps is not self._timesteps
        self._timesteps = timesteps if stable else None
        if begins:
            self.check_hooks()
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


def _too_many() -> ConfigError:
    return ConfigError(
        "too many transformers of different structures or shapes were compiled in this process",
        where="accelerate(pipeline)",
        remedy="call torch._dynamo.reset(), which forgets all that was compiled, and run again",
    )


def _check_hooks(module: nn.Module, plan: Plan | None) -> None:
    """Raise ``ConfigError`` if ``module`` has hooks that ``plan`` cannot run with."""
    check_not_cached(module)
    if not is_opaque(plan):
        check_parts_not_hooked(module)


def _explained(error: ConfigError, call: str, shared: bool) -> ConfigError | None:
    """Return ``error`` with the ``call`` of the pipeline, where that helps to understand it."""
    if call and shared:
        what = f"{call} shares the transformer that was accelerated with another pipeline"
        remedy = "calibrate a plan with this pipeline, or restore() the transformer"
        return ConfigError(f"{what}\n{error}", remedy=remedy)
    return ConfigError(f"{error}\n  call:     {call}") if "=" in call else None


def restore(pipeline: Any) -> Any:
    """Undo ``accelerate``: the transformer runs as it did before; return the pipeline.

    A pipeline that is not accelerated is left as it is.

    Raises:
        ConfigError: the pipeline has no transformer.
    """
    module = transformer_of(pipeline, "restore(pipeline)")
    stop_watching(pipeline)
    restore_forward(module)
    give_back(module)
    return pipeline
