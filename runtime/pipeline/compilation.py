"""What ``torch.compile`` has put around a transformer, set aside while that runs by a plan.

A plan compiles what it runs, or calls the model as it is. A compilation around it would compile
nothing, or fail where it must be one graph.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, NoReturn, cast
from weakref import ref

from torch import nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.pipeline.denoiser import denoiser_name
from ditfastattn.runtime.pipeline.forwards import Forward, ReplacedMethod

log = logging.getLogger(__name__)

_ASIDE = "_ditfastattn_compilation"  # in a module's dict, while it runs by a plan
_CALL = "_compiled_call_impl"  # there too, where its compile() was called
_COMPILE = "compile"


class Compilation:
    """Hold what was compiled around ``module``: in pipelines, and by its ``compile()``.

    It belongs to that very module: in the dict of a copy there is None in its place.
    """

    def __init__(self, module: nn.Module) -> None:
        """Set aside what ``compile()`` made; from now on that is refused."""
        self._call: Forward | None = vars(module).pop(_CALL, None)
        self._compiler = None if self._call is None else _compiler_of_call(self._call)
        self._held: list[tuple[ref[Any], str, nn.Module]] = []
        self._compiled: dict[Forward, Forward] = {}
        vars(module)[_COMPILE] = ReplacedMethod(module.compile, _refuse)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a copy runs as it is."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle None: a copy runs as it is."""
        return type(None), ()

    def take_from(self, pipeline: Any, module: nn.Module) -> None:
        """Set aside what ``pipeline`` holds around ``module``: it may be compiled at any time."""
        name = denoiser_name(pipeline)
        held = getattr(pipeline, name)
        if getattr(held, "_orig_mod", None) is module:
            self._held.append((ref(pipeline), name, held))
            self._compiler = held.dynamo_ctx
            self._compiled.clear()
            setattr(pipeline, name, module)
            log.info("%s runs by a plan: torch.compile around it is set aside", name)

    def of(self, forward: Forward) -> Forward:
        """Return ``forward`` compiled as the module was last."""
        if self._compiler is None:
            return forward
        if forward not in self._compiled:
            self._compiled[forward] = self._compiler(forward)
        return self._compiled[forward]

    def give_back(self, module: nn.Module) -> None:
        """Put it around ``module`` again, unless something else has taken its place."""
        vars(module).pop(_COMPILE, None)
        if self._call is not None:
            vars(module).setdefault(_CALL, self._call)
        for reference, name, held in reversed(self._held):  # the last one, where there are several
            pipeline = reference()
            if pipeline is not None and getattr(pipeline, name, None) is module:
                setattr(pipeline, name, held)


def set_aside(module: nn.Module) -> Compilation:
    """Set aside what is compiled around ``module``."""
    made = vars(module)[_ASIDE] = Compilation(module)
    return made


def give_back(module: nn.Module) -> None:
    """Undo ``set_aside``, if it was called."""
    aside: Compilation | None = vars(module).pop(_ASIDE, None)
    if aside is not None:
        aside.give_back(module)


def _compiler_of_call(compiled: Forward) -> Callable[[Forward], Forward]:
    """Return what compiled a function; torch keeps it in the function's closure alone."""
    compiler: Any = inspect.getclosurevars(compiled).nonlocals.get("self")
    if not callable(compiler):
        raise ConfigError(
            "this version of torch does not show how the transformer was compiled",
            where="transformer.compile()",
            remedy="use pipeline.transformer = torch.compile(pipeline.transformer) instead",
        )
    return cast(Callable[[Forward], Forward], compiler)


def _refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise ConfigError(
        "the transformer runs by a plan, which compiles it",
        where="transformer.compile()",
        remedy="call compile() first and accelerate(pipeline) then, or restore(pipeline) before",
    )
