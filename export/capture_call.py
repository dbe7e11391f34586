"""Capture a call of a transformer as a graph, at one batch size or at twice that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.capture.dynamo import capture, describe_inputs
from ditfastattn.passes.capture.plain_tensors import plain_tensors
from ditfastattn.passes.capture.traced import TracedCall
from ditfastattn.runtime.lowering import many_compilations
from ditfastattn.runtime.pipeline.denoiser import plain_module
from ditfastattn.runtime.pipeline.forwards import replace_forward
from ditfastattn.runtime.traced import BROKEN, TracedCalls, log_fallback, once_warm


@dataclass(frozen=True)
class RecordedCall:
    """Hold the arguments of one call of a transformer, by name."""

    arguments: Mapping[str, Any]

    @property
    def batch(self) -> int:
        """Return the first dimension of the latent, the first argument that is a tensor."""
        first = next(item for item in self.arguments.values() if isinstance(item, Tensor))
        return int(first.shape[0])

    def doubled(self) -> RecordedCall:
        """Return the call with twice the batch."""
        batch = self.batch
        doubled = {name: _doubled(item, batch) for name, item in self.arguments.items()}
        return RecordedCall(doubled)


def _doubled(item: Any, batch: int) -> Any:
    if isinstance(item, Tensor):
        return torch.cat([item, item]) if item.dim() and item.shape[0] == batch else item
    if isinstance(item, (tuple, list)):
        return type(item)(_doubled(part, batch) for part in item)
    if isinstance(item, dict):
        return {key: _doubled(part, batch) for key, part in item.items()}
    return item


@dataclass(frozen=True)
class CapturedCall:
    """Hold the graph of a call and its flat inputs."""

    graph: CapturedGraph
    tensors: tuple[Tensor, ...]
    traced: TracedCall | None = None  # where Dynamo makes no graph of it


def capture_call(model: nn.Module, call: RecordedCall, timestep: str = "timestep") -> CapturedCall:
    """Capture ``model``, called with ``call``, as one graph.

    Raises:
        ConfigError: it is not one graph.
    """
    plain = plain_module(model)
    try:
        made: CapturedCall = once_warm(
            lambda: _by_dynamo(plain, call), plain.forward, (), call.arguments
        )
        return made
    except BROKEN as error:
        log_fallback(type(plain).__name__, error)
    with torch.no_grad():
        calls = TracedCalls(plain, timestep)
        traced, tensors, _ = calls.find(plain.forward, (), call.arguments)
    return CapturedCall(traced.captured, tuple(tensors), traced)


def _by_dynamo(plain: nn.Module, call: RecordedCall) -> CapturedCall:
    found: list[CapturedCall] = []

    def backend(module: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        inputs = describe_inputs(module)

        def run(*args: Any) -> Any:
            tensors = tuple(plain_tensors(args))
            found.append(CapturedCall(capture(module, inputs, args), tensors))
            return module(*args)

        return run

    undo = replace_forward(
        plain,
        lambda forward: torch.compile(forward, backend=backend, fullgraph=True, dynamic=False),
    )
    try:
        with torch.no_grad(), many_compilations():
            plain(**call.arguments)
    finally:
        undo()
    if len(found) != 1:
        raise ConfigError("the model is not one graph", got=f"{len(found)} graphs")
    return found[0]
