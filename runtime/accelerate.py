"""Run a pipeline's transformer by a plan, in one line, and undo it in another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.fx import GraphModule

from ditfastattn.core.choices import choice_named
from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.capture.captured_graph import GraphInput
from ditfastattn.passes.capture.dynamo import describe_inputs
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.text import PaddedText
from ditfastattn.runtime.dynamo_adapter import PlannedFunction
from ditfastattn.runtime.given_plans import AnyPlans, given_plans
from ditfastattn.runtime.lowering import many_compilations
from ditfastattn.runtime.opaque import OpaqueModel, is_opaque
from ditfastattn.runtime.options import BackendOptions, parse_options
from ditfastattn.runtime.pipeline.compilation import Compilation, give_back, set_aside
from ditfastattn.runtime.pipeline.denoiser import plain_module, second_of, transformer_of
from ditfastattn.runtime.pipeline.experts import whole_pipeline
from ditfastattn.runtime.pipeline.forwards import (
    Forward,
    is_planned,
    plan_forward,
    planned_forward,
    restore_forward,
)
from ditfastattn.runtime.pipeline.generation_end import stop_watching, warn_if_unused
from ditfastattn.runtime.pipeline.model_call import by_name
from ditfastattn.runtime.pipeline.sampler import check_sampler
from ditfastattn.runtime.pipeline.text_padding import pad_text
from ditfastattn.runtime.pipeline_watch import PipelineWatch, check_hooks
from ditfastattn.runtime.plan_choice import Candidate, Choice, OnMismatch, PlanChoice
from ditfastattn.runtime.traced import BROKEN, TracedFallback, TracedFunction, once_warm

log = logging.getLogger(__name__)


def accelerate(
    pipeline: Any,
    plan: AnyPlans = None,
    *,
    on_mismatch: str = OnMismatch.ERROR,
    mode: str | None = None,
    **options: Any,
) -> Any:
    """Compile ``pipeline.transformer`` by ``plan``, in place, and return the pipeline.

    The module stays the pipeline's own: only its forward is replaced, beneath offloading hooks.
    A ``torch.compile`` around it is set aside. A copy of it (deepcopy, pickle) runs dense, with its
    own weights. A pipeline that is accelerated already gets the new plan. A second transformer, of
    low-noise steps, has a plan of its own: see ``second_transformer``. The scheduler, its config,
    and the guidance scale are compared with the plan's as generations begin; they are those of the
    pipeline that calls, where several share the transformer.

    Args:
        pipeline: a diffusers pipeline with a ``transformer``.
        plan: the plan, or its path; without one the first generation calibrates itself. Of several
            the first one runs that is for a generation's sampler, steps, guidance and shapes; of a
            plan book, the first one of the tier that is asked for (``quality``).
        on_mismatch: what becomes of a generation that no plan is for: ``"error"``, or ``"dense"``:
            it runs dense, with a warning for each reason, and is counted (``dense_generations``).
        mode: a mode of ``torch.compile``, such as ``"reduce-overhead"``.
        **options: the backend's other options, as ``torch.compile(options=...)`` takes them.

    Returns:
        The pipeline.

    Raises:
        ConfigError: there is no transformer, or one whose parts are cached or moved while it runs;
            the plan cannot be read, or is for another scheduler.
    """
    where = "accelerate(pipeline)"
    module = transformer_of(pipeline, where)
    given = given_plans(plan)
    plans = [one.plan for one in given.plans]
    otherwise = choice_named(OnMismatch, on_mismatch, "accelerate(on_mismatch)")
    scheduler = getattr(pipeline, "scheduler", None)
    if len(plans) != 1 or given.tiers is not None or otherwise is OnMismatch.DENSE:
        _check_choice(plans, scheduler)
    elif plans[0] is not None and scheduler is not None:
        check_sampler(plans[0], scheduler)
    second = second_of(pipeline)
    if second is not None and not is_planned(second):
        log.warning(
            "ditfastattn: transformer_2 runs dense: a plan is of `transformer` alone; give it its "
            "own by accelerate(second_transformer(pipeline), plan)"
        )
    chosen = [
        parse_options({**options, **({} if one is None else {"plan": one})}, mode) for one in plans
    ]
    check_hooks(module, plans)
    texts = _texts(plans)
    _restore(module)
    stop_watching(pipeline)
    pad_text(module, texts)
    models = [_opaque_model(module, each) for each in chosen]
    compilation = set_aside(module)
    compilation.take_from(pipeline, module)
    watch = PipelineWatch(ref(whole_pipeline(pipeline)), ref(module), plans, compilation)

    def choose(own: Forward) -> PlanChoice:
        compiled: Any = torch.compile(own, backend=_backend, fullgraph=True)

        def make_run(each: BackendOptions, model: OpaqueModel | None) -> Forward:
            if model is None:
                return _PlannedForward(own, module, compiled, each, watch)
            return _opaque(own, model, compilation)

        candidates = [
            Candidate(one.plan, partial(make_run, each, model), one.name, one.tier)
            for one, each, model in zip(given.plans, chosen, models, strict=True)
        ]
        dense = _dense(own, compilation)
        return PlanChoice(module, candidates, dense, otherwise, given.tiers, given.most_compiled)

    plan_forward(module, lambda own: _Chosen(choose(own), watch))
    warn_if_unused(pipeline, module, lambda: watch.calls)
    return pipeline


def dense_generations(pipeline: Any) -> dict[str, int]:
    """Count the generations that ran dense since ``accelerate``, because no plan was for them.

    See ``on_mismatch`` of ``accelerate``.

    Args:
        pipeline: an accelerated pipeline.

    Returns:
        How many, by the reason.

    Raises:
        ConfigError: the pipeline has no transformer, or is not accelerated.
    """
    return dict(_choice_of(pipeline, "dense_generations(pipeline)").dense_generations)


def chosen_plan(pipeline: Any) -> Choice:
    """Return what runs, or ran last, a generation of this thread or context.

    Raises:
        ConfigError: the pipeline has no transformer, or is not accelerated.
    """
    return _choice_of(pipeline, "chosen_plan(pipeline)").choice


def _choice_of(pipeline: Any, where: str) -> PlanChoice:
    run = planned_forward(transformer_of(pipeline, where))
    if not isinstance(run, _Chosen):
        raise ConfigError(
            "the pipeline is not accelerated",
            where=where,
            remedy="call accelerate(pipeline, plan) first",
        )
    return run.choice


def _check_choice(plans: Sequence[Plan | None], scheduler: Any) -> None:
    """Raise ``ConfigError`` where the generations that plans are chosen for cannot be told."""
    if None in plans:
        raise ConfigError(
            "a first generation that calibrates cannot run dense",
            where="accelerate(on_mismatch)",
            got=OnMismatch.DENSE,
            remedy="give a plan",
        )
    if getattr(scheduler, "timesteps", None) is None:
        raise ConfigError(
            "a plan is chosen as a generation begins, which the pipeline does not show",
            where="accelerate(pipeline)",
            got="no scheduler with timesteps" if scheduler is None else type(scheduler).__name__,
            remedy="give one plan, and on_mismatch='error'",
        )


def _texts(plans: Sequence[Plan | None]) -> list[PaddedText]:
    """Return to what the text is padded, by each length of ``plans``.

    Raises:
        ConfigError: some plans are for padded text, and others for text as it is, or by other
            arguments.
    """
    texts = list(dict.fromkeys(None if plan is None else plan.text for plan in plans))
    if texts == [None]:
        return []
    found = [text for text in texts if text is not None]
    if len({(text.argument, text.mask) for text in found}) > 1 or len(found) < len(texts):
        raise ConfigError(
            "the plans are for texts that are padded differently",
            where="accelerate(plan): plan.text",
            got="; ".join(str(text and text.model_dump()) for text in texts),
            expected="one argument and one mask, of any lengths",
            remedy="calibrate all of them with text_length, or none",
        )
    return found


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
    """Run the forward of one module, compiled, by one plan."""

    def __init__(
        self,
        own: Forward,
        module: nn.Module,
        compiled: Forward,
        options: BackendOptions,
        watch: PipelineWatch,
    ) -> None:
        self._own, self._kind = own, type(module)
        self._compiled, self._options, self._watch = compiled, options, watch
        self._traced = TracedFallback(lambda: TracedFunction(module, options))
        self._functions: WeakKeyDictionary[_DynamoGraph, PlannedFunction] = WeakKeyDictionary()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._traced.function is not None:
            return self._traced.function(self._own, args, kwargs)
        token = _under_way.set(self)
        try:
            with many_compilations():  # models of one class count together
                args, kwargs = by_name(self._kind, args, kwargs)
                return once_warm(lambda: self._compiled(*args, **kwargs), self._own, args, kwargs)
        except FailOnRecompileLimitHit as error:  # it is no TorchDynamoException
            raise _too_many() from error
        except BROKEN as error:
            self._watch.check_hooks()  # a better reason, if that is one
            broken: Exception = error
        finally:
            _under_way.reset(token)
        return self._traced.take_over(self._kind.__name__, broken)(self._own, args, kwargs)

    def function(self, graph: _DynamoGraph) -> PlannedFunction:
        """Return what runs ``graph`` by the plan."""
        if graph not in self._functions:
            made = PlannedFunction(graph.module, self._options, graph.inputs)
            self._functions.setdefault(graph, made)
        return self._functions[graph]


_under_way: ContextVar[_PlannedForward] = ContextVar("ditfastattn_planned_forward")


def _opaque_model(module: nn.Module, options: BackendOptions) -> OpaqueModel | None:
    """Return what runs an opaque plan, matched with ``module``; None for any other plan."""
    plan = options.plan
    if plan is None or not is_opaque(plan):
        return None
    return OpaqueModel(module, plan, options.timestep, options.check_weights)


def _opaque(own: Forward, model: OpaqueModel, compilation: Compilation) -> Forward:
    return lambda *args, **kwargs: model(compilation.of(own), args, kwargs)


def _dense(own: Forward, compilation: Compilation) -> Forward:
    return lambda *args, **kwargs: compilation.of(own)(*args, **kwargs)


class _Chosen:
    """Run each call by the plan that was chosen for its generation."""

    def __init__(self, choice: PlanChoice, watch: PipelineWatch) -> None:
        self.choice, self._watch = choice, watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for item in (*args, *kwargs.values()):
            if isinstance(item, Tensor) and item.dim() > 0 and len(item) == 0:
                raise ConfigError(
                    "the batch is empty", where="a call of the transformer", got=list(item.shape)
                )
        with self._watch.call() as moment:
            return self.choice(moment, args, kwargs)


def _too_many() -> ConfigError:
    return ConfigError(
        "too many transformers of different structures or shapes were compiled in this process",
        where="accelerate(pipeline)",
        remedy="call torch._dynamo.reset(), which forgets all that was compiled, and run again",
    )


def restore(pipeline: Any) -> Any:
    """Undo ``accelerate``: the transformer runs as it did before, and the second one, if any.

    A pipeline that is not accelerated is left as it is.

    Args:
        pipeline: a diffusers pipeline.

    Returns:
        The pipeline.

    Raises:
        ConfigError: the pipeline has no transformer.
    """
    module = transformer_of(pipeline, "restore(pipeline)")
    stop_watching(pipeline)
    second = second_of(pipeline)
    for each in (module,) if second is None else (module, plain_module(second)):
        _restore(each)
    return pipeline


def _restore(module: nn.Module) -> None:
    if is_planned(module):
        pad_text(module, ())
    restore_forward(module)
    give_back(module)
