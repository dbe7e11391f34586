"""Look at the pipeline that calls a transformer, before each call."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.current_generation import PerGeneration, naming_generation
from ditfastattn.runtime.opaque import is_opaque
from ditfastattn.runtime.pipeline.caller import calling_pipeline, describe_call, is_second
from ditfastattn.runtime.pipeline.compilation import Compilation
from ditfastattn.runtime.pipeline.copies import original_of
from ditfastattn.runtime.pipeline.hooks import check_not_cached, check_parts_not_hooked
from ditfastattn.runtime.plan_choice import Moment


@dataclass
class _UnderWay:
    """The schedule of the generation under way in one thread or context."""

    timesteps: object | None = None


class PipelineWatch:
    """Find the pipeline that calls one transformer, and where in its generations it is."""

    def __init__(
        self,
        pipeline: ref[Any],
        module: ref[nn.Module],
        plans: Sequence[Plan | None],
        compilation: Compilation,
    ) -> None:
        """Take the accelerated pipeline, its transformer and plans."""
        self._pipeline, self._module, self._plans = pipeline, module, plans
        self._compilation = compilation
        self.calls = 0
        self._under_way = PerGeneration(_UnderWay)

    @contextmanager
    def call(self) -> Generator[Moment]:
        """Find the pipeline that calls; the call runs within.

        An error gets the call of that pipeline added, where it is not the accelerated one.
        """
        self.calls += 1
        module, own = self._module(), self._pipeline()
        caller = None if module is None else calling_pipeline(module)
        if module is not None and caller is not None:
            self._compilation.take_from(caller, module)
        try:
            moment = self._moment(own if caller is None else caller)
            with naming_generation(self._under_way.current().timesteps):
                yield moment
        except ConfigError as error:
            call = "" if module is None or caller is None else describe_call(module)
            explained = _explained(error, call, original_of(caller) is not own)
            if explained is None:
                raise
            raise explained from error

    def check_hooks(self) -> None:
        """Raise ``ConfigError`` if hooks have come since that the plan cannot run with."""
        module = self._module()
        if module is not None:
            check_hooks(module, self._plans)

    def _moment(self, pipeline: Any) -> Moment:
        """Return where in the generations of ``pipeline`` this is."""
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps: object | None = getattr(scheduler, "timesteps", None)  # set once a generation
        stable = timesteps is getattr(scheduler, "timesteps", None)
        under_way = self._under_way.current()
        begins = timesteps is not None and stable and timesteps is not under_way.timesteps
        under_way.timesteps = timesteps if stable else None
        if begins:
            self.check_hooks()
        return Moment(pipeline, begins, is_second(pipeline, self._module()))


def check_hooks(module: nn.Module, plans: Sequence[Plan | None]) -> None:
    """Raise ``ConfigError`` if ``module`` has hooks that one of ``plans`` cannot run with."""
    check_not_cached(module)
    if not all(map(is_opaque, plans)):
        check_parts_not_hooked(module)


def _explained(error: ConfigError, call: str, shared: bool) -> ConfigError | None:
    """Return ``error`` with the ``call`` of the pipeline, where that helps to understand it."""
    if call and shared:
        what = f"{call} shares the transformer that was accelerated with another pipeline"
        remedy = "calibrate a plan with this pipeline, or restore() the transformer"
        return ConfigError(f"{what}\n{error}", remedy=remedy)
    return ConfigError(f"{error}\n  call:     {call}") if "=" in call else None
