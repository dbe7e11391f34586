"""Warn of a pipeline that was accelerated, but whose generations do not run by the plan."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import ref

from torch import nn

from ditfastattn.runtime.pipeline.caller import holds
from ditfastattn.runtime.pipeline.denoiser import denoiser_name
from ditfastattn.runtime.pipeline.forwards import ReplacedMethod, is_planned

log = logging.getLogger(__name__)

_END = "maybe_free_model_hooks"  # what diffusers' pipelines call as a generation ends


def warn_if_unused(pipeline: Any, module: nn.Module, calls: Callable[[], int]) -> None:
    """Warn once where a generation of ``pipeline`` ends that has not called the planned ``module``.

    ``calls`` returns how often it was called so far. A pipeline that does not announce the end of
    its generations is not watched.
    """
    stop_watching(pipeline)
    end = getattr(pipeline, _END, None)
    if end is not None:
        watch = _Watch(module, calls, _timesteps(pipeline))
        owner = ref(pipeline)

        def ended() -> None:
            watch.look(owner())
            end()

        vars(pipeline)[_END] = ReplacedMethod(end, ended)


def stop_watching(pipeline: Any) -> None:
    """Undo ``warn_if_unused``, if it was called."""
    if isinstance(getattr(pipeline, "__dict__", {}).get(_END), ReplacedMethod):
        del vars(pipeline)[_END]


class _Watch:
    """Compare the calls of a module before and after each generation."""

    def __init__(self, module: nn.Module, calls: Callable[[], int], timesteps: object) -> None:
        self._module, self._calls, self._timesteps = ref(module), calls, timesteps
        self._seen = calls()
        self._warned = False

    def look(self, pipeline: Any) -> None:
        """Warn if a generation has ended without a call."""
        timesteps, calls, module = _timesteps(pipeline), self._calls(), self._module()
        generated, used = timesteps is not self._timesteps, calls != self._seen
        self._timesteps, self._seen = timesteps, calls
        if used or not generated or self._warned or (module is not None and not is_planned(module)):
            return
        self._warned = True
        log.warning(
            "ditfastattn: the pipeline was accelerated, but a generation has ended that did not "
            "run by the plan: %s",
            _reason(pipeline, module),
        )


def _reason(pipeline: Any, module: nn.Module | None) -> str:
    name = denoiser_name(pipeline)
    if module is None or not holds(pipeline, module):
        kind = type(getattr(pipeline, name, None)).__name__
        return f"its {name} is another one now ({kind}); call accelerate() again"
    if vars(module).get("forward") is None:
        return f"something has taken the plan from its {name}; call accelerate() again"
    return f"its {name} was not called"


def _timesteps(pipeline: Any) -> object:
    """Return the schedule of the last generation, an object that is new for each."""
    return getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
