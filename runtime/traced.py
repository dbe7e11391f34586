"""Run a model whose graph Dynamo breaks: its calls are traced with their inputs.

A trace holds for calls of its shapes that read the same of their inputs, and for modules whose
settings are those of the trace. A call that reads otherwise, as another length of the prompt, is
traced again; the plan is then matched with the new graph like any other.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils import _pytree as pytree

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.latent import latent_candidates
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.capture.dynamo import DataDependenceError, refuse_autocast
from ditfastattn.passes.capture.traced import TracedCall, flat_tensors, trace
from ditfastattn.runtime.current_generation import named_generation
from ditfastattn.runtime.options import BackendOptions
from ditfastattn.runtime.pipeline.forwards import Forward
from ditfastattn.runtime.pipeline.model_call import bound_arguments
from ditfastattn.runtime.settings import Settings
from ditfastattn.runtime.specializations import Specialization, specialization_of
from ditfastattn.runtime.writes import counted_writes

log = logging.getLogger(__name__)


_PLAIN = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, type(None))
_MOST = 16  # traces of one structure and shape; the oldest one goes


BROKEN = (TorchDynamoException, DataDependenceError)  # Dynamo makes no graph


def once_warm(call: Callable[[], Any], forward: Forward, args: Any, kwargs: Any) -> Any:
    """Return what ``call`` returns, by Dynamo; where that fails, try again after ``forward`` ran.

    A first call makes what later ones find, such as tables of positions, and may do that in a way
    that Dynamo does not know. So a model is captured in one way, whenever that is.
    """
    try:
        return call()
    except BROKEN:
        with torch.no_grad():
            forward(*args, **kwargs)
        return call()


@dataclass(eq=False)
class _Known:
    """A trace, and what has been compared with it already."""

    call: TracedCall
    settings: Settings
    reason: str = ""  # why earlier traces did not serve
    generation: object | None = None
    read: tuple[Any, ...] = ()

    def differs(self, module: nn.Module, flat: Sequence[Tensor]) -> str:
        """Return why a call with the inputs ``flat`` is none of this trace, or "".

        Both settings and reads are compared as a generation begins; within one, reads only of
        other tensors than before, or of those that were written to.
        """
        generation = named_generation()
        begins = generation is None or generation is not self.generation
        if begins and (changed := self.settings.changed(module)):
            return changed
        given = [flat[index] for index in self.call.guards.positions]
        if not begins and self._are_known(given):
            return ""
        self.generation = generation
        failed = self.call.guards.failure(flat)
        self.read = () if failed else tuple((weakref.ref(item), *_state(item)) for item in given)
        return str(failed or "")

    def _are_known(self, given: Sequence[Tensor]) -> bool:
        """Return whether these very tensors were compared, and no counted write has changed one."""
        if len(given) != len(self.read) or any(item.is_inference() for item in given):
            return False
        pairs = zip(self.read, given, strict=True)
        return all(ref() is item and state == _state(item) for (ref, *state), item in pairs)


def _state(tensor: Tensor) -> list[int]:
    return [counted_writes(tensor), tensor.data_ptr()]


class TracedCalls:
    """Find the trace that a call of one module runs by, made where there is none."""

    def __init__(self, module: nn.Module, timestep: str) -> None:
        """Take the module, and the name of its argument that holds the timestep."""
        self._module, self._timestep = weakref.ref(module), timestep
        self._known: dict[Any, list[_Known]] = {}
        self._lock = threading.RLock()

    def find(
        self, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[TracedCall, list[Tensor], str]:
        """Return the trace, the inputs of its graph, and why an earlier one did not serve, or "".

        Raises:
            ConfigError: the call cannot be captured.
        """
        module = self._module()
        assert module is not None
        arguments = bound_arguments(type(module), args, kwargs)
        flat = flat_tensors(module, arguments)
        refuse_autocast(flat)
        with self._lock:
            key = _key(arguments, flat)
            reasons: list[str] = []
            every = self._known.setdefault(key, [])  # the last used first
            for place, known in enumerate(every):
                reason = known.differs(module, flat)
                if not reason:
                    every.insert(0, every.pop(place))
                    why = reasons[0] if reasons else known.reason
                    return known.call, known.call.inputs_of(flat), why
                reasons.append(reason)
            made = trace(forward, module, arguments, self._varying)
            _report(module, made, reasons)
            flat = flat_tensors(module, arguments)  # the first call may have made tables, say
            every = self._known.setdefault(_key(arguments, flat), [])
            reason = reasons[0] if reasons else ""
            every.insert(0, _Known(made, Settings(module), reason))
            del every[_MOST:]
            return made, made.inputs_of(flat), reason

    def _varying(self, captured: CapturedGraph) -> list[int]:
        named = [
            index
            for index, entry in enumerate(captured.inputs)
            if entry.name == self._timestep and not entry.static
        ]
        return [*latent_candidates(captured), *named]


class TracedFunction:
    """Run the calls of one module by a plan, or calibrate one while running."""

    def __init__(self, module: nn.Module, options: BackendOptions) -> None:
        """Trace calls of ``module`` as they come."""
        self._calls = TracedCalls(module, options.timestep)
        self._options = options
        self._specializations: weakref.WeakKeyDictionary[TracedCall, Specialization] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what ``forward`` returns of these arguments, by the plan.

        Raises:
            ConfigError: the call cannot be captured, or the plan is not for it.
        """
        if torch.is_grad_enabled() and any(
            isinstance(item, Tensor) and item.requires_grad
            for item in pytree.tree_leaves((args, dict(kwargs)))
        ):
            raise ConfigError(
                "a plan runs inference only",
                where="a call with gradients enabled",
                remedy="call the model under torch.no_grad()",
            )
        with torch.no_grad():
            call, tensors, otherwise = self._calls.find(forward, args, kwargs)
            try:
                if call not in self._specializations:
                    made = specialization_of(call.captured, self._options)
                    self._specializations[call] = made
                return call.returned(self._specializations[call].step(tensors))
            except ConfigError as error:
                if not otherwise:
                    raise
                raise ConfigError(
                    f"{error}\n  this call reads other values than an earlier one: {otherwise}",
                    remedy="calibrate a plan with such a prompt, or pad prompts to one length",
                ) from error

    @property
    def specializations(self) -> tuple[Specialization, ...]:
        """Return the specializations made so far."""
        return tuple(self._specializations.values())


def _key(arguments: Mapping[str, Any], flat: Sequence[Tensor]) -> Any:
    """Return what a trace is for: structure, shapes, and arguments that are no tensors."""
    leaves, structure = pytree.tree_flatten(dict(arguments))
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    for leaf in others:
        if not isinstance(leaf, _PLAIN):
            raise ConfigError(
                "an argument is an object of its own kind, which may hold tensors and change",
                where="a call of the transformer",
                got=type(leaf).__name__,
                expected="tensors, numbers, strings, and lists, tuples or dicts of them",
                remedy="plan whole steps: calibrate(method='whole-steps')",
            )
    numbers = tuple((type(leaf), leaf) for leaf in others)
    kinds = tuple((item.shape, item.stride(), item.dtype, item.device) for item in flat)
    return structure, numbers, kinds


def _report(module: nn.Module, made: TracedCall, reasons: Sequence[str]) -> None:
    kind = type(module).__name__
    if reasons:
        log.warning(
            "ditfastattn: a call of %s is traced again, as it differs from an earlier one: %s",
            kind,
            reasons[0],
        )
    for read in made.guards.reads:
        log.info("%s: the graph holds for equal %s", kind, read)
    for path, line in made.opaque.items():
        log.warning(
            "ditfastattn: %s.%s is called as it is, as it reads what is denoised: %s",
            kind,
            path,
            line,
        )


class TracedFallback:
    """Say once that calls are traced, and trace them: where Dynamo has failed."""

    def __init__(self, make: Callable[[], TracedFunction]) -> None:
        """Take what makes the function."""
        self._make = make
        self.function: TracedFunction | None = None

    def take_over(self, kind: str, error: BaseException) -> TracedFunction:
        """Return the function from now on; ``error`` is Dynamo's."""
        if self.function is None:
            log_fallback(kind, error)
            self.function = self._make()
        return self.function


def log_fallback(kind: str, error: BaseException) -> None:
    """Say that calls of the class ``kind`` are traced, as Dynamo fails with ``error``."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    log.warning(
        "ditfastattn: Dynamo makes no single graph of %s (%s); its calls are traced with their "
        "inputs instead",
        kind,
        reason,
    )
