"""What ``torch.compile`` calls in place of the graph that Dynamo captured.

A ``PlannedFunction`` stands for one graph. It keys on the shapes it is called with; everything for
one set of shapes is a ``Specialization``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.capture.captured_graph import GraphInput
from ditfastattn.passes.capture.dynamo import capture, describe_inputs, plain_numbers
from ditfastattn.passes.capture.plain_tensors import plain_tensors
from ditfastattn.runtime.options import BackendOptions
from ditfastattn.runtime.specializations import Specialization, specialization_of


class PlannedFunction:
    """Run the graph that Dynamo captured by a plan, or calibrate one while running."""

    def __init__(
        self,
        module: GraphModule,
        options: BackendOptions,
        inputs: tuple[GraphInput, ...] | None = None,
    ) -> None:
        """Take the graph as Dynamo hands it to a backend; ``inputs`` where they are known."""
        self._module = module
        self._inputs = describe_inputs(module) if inputs is None else inputs
        self._dynamic = tuple(i for i, entry in enumerate(self._inputs) if not entry.static)
        self._numbers = any(entry.number for entry in self._inputs)
        self._options = options
        self._lock = threading.RLock()
        self._specializations: dict[tuple[Any, ...], Specialization] = {}

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """Run one step on the flat inputs of the graph."""
        plain = plain_numbers(self._inputs, args) if self._numbers else args
        tensors = plain_tensors(plain)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise ConfigError(
                "the ditfastattn backend runs inference only",
                where="a call with gradients enabled",
                remedy="call the model under torch.no_grad()",
            )
        return self._specialize(plain).step(tensors)

    @property
    def specializations(self) -> tuple[Specialization, ...]:
        """Return the specializations made so far."""
        return tuple(self._specializations.values())

    def _specialize(self, args: Sequence[Any]) -> Specialization:
        # Dynamo guards the static inputs: only the call's own tensors can differ in shape.
        key = tuple(
            (argument.shape, argument.dtype, argument.device)
            if isinstance(argument, Tensor)
            else argument
            for argument in (args[index] for index in self._dynamic)
        )
        found = self._specializations.get(key)
        if found is not None:
            return found
        with self._lock:
            if key not in self._specializations:
                captured = capture(self._module, self._inputs, args)
                self._specializations[key] = specialization_of(captured, self._options)
            return self._specializations[key]
