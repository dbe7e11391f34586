"""Run a pipeline's transformer by a plan, in one line, and undo it in another."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.fx import GraphModule

from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.dynamo_adapter import PlannedFunction
from ditfastattn.runtime.options import parse_options
from ditfastattn.runtime.pipeline.denoiser import (
    accelerated,
    check_not_hooked,
    replace_forward,
    transformer_of,
)
from ditfastattn.runtime.pipeline.guidance import current_guidance
from ditfastattn.runtime.pipeline.sampler import check_sampler

log = logging.getLogger(__name__)

_undo: WeakKeyDictionary[nn.Module, Callable[[], None]] = WeakKeyDictionary()


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
    check_not_hooked(module)
    loaded = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
    scheduler = getattr(pipeline, "scheduler", None)
    if loaded is not None and scheduler is not None:
        check_sampler(loaded, scheduler)
    if getattr(pipeline, "transformer_2", None) is not None:
        log.warning("ditfastattn: transformer_2 runs dense: a plan is of `transformer` alone")
    chosen = parse_options({**options, **({} if loaded is None else {"plan": loaded})}, mode)
    restore(pipeline)
    pipeline.transformer = module  # a torch.compile around it would compile what runs compiled

    def backend(graph: GraphModule, _example: Sequence[Any]) -> PlannedFunction:
        return PlannedFunction(graph, chosen)

    def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
        made: Callable[..., Any] = torch.compile(forward, backend=backend, fullgraph=True)
        return made if loaded is None else _of_this_sampler(made, pipeline, loaded)

    _undo[module] = replace_forward(module, compiled)
    accelerated.add(module)
    return pipeline


def _of_this_sampler(forward: Callable[..., Any], pipeline: Any, plan: Plan) -> Callable[..., Any]:
    """Return ``forward``, which first refuses what has become of the pipeline's sampler."""
    owner = ref(pipeline)
    accepted: list[Any] = [None, None, None]  # what was compared last is compared by identity

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        scheduler = getattr(owner(), "scheduler", None)
        # A scheduler that counts has no index before a generation's first step; of one that does
        # not, the guidance cannot be told from one that a pipeline changes from step to step.
        if scheduler is not None and getattr(scheduler, "step_index", None) is None:
            counts = hasattr(scheduler, "step_index")
            found = [scheduler, scheduler.config, current_guidance(owner()) if counts else None]
            if any(one is not other for one, other in zip(found, accepted, strict=True)):
                check_sampler(plan, scheduler, found[2])
                accepted[:] = found
        return forward(*args, **kwargs)

    return run


def restore(pipeline: Any) -> Any:
    """Undo ``accelerate``: the transformer runs as it did before; return the pipeline.

    A pipeline that is not accelerated is left as it is.

    Raises:
        ConfigError: the pipeline has no transformer.
    """
    module = transformer_of(pipeline, "restore(pipeline)")
    undo = _undo.pop(module, None)
    if undo is not None:
        undo()
        accelerated.discard(module)
    return pipeline
