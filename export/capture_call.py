"""Capture a call of a transformer as a graph, at one batch size or at twice that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.batch import FIX_BATCH
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.capture.dynamo import capture, describe_inputs
from ditfastattn.passes.capture.plain_tensors import plain_tensors
from ditfastattn.passes.capture.traced import TracedCall
from ditfastattn.runtime.lowering import many_compilations
from ditfastattn.runtime.pipeline.denoiser import plain_module
from ditfastattn.runtime.pipeline.forwards import replace_forward
from ditfastattn.runtime.traced import BROKEN, TracedCalls, log_fallback, once_warm

log = logging.getLogger(__name__)


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
        """Return the call with twice the batch: tensors of as many rows as it are repeated."""
        batch, made = self.batch, dict[int, Tensor]()
        doubled = {name: _doubled(item, batch, made) for name, item in self.arguments.items()}
        return RecordedCall(doubled)

    def doubled_otherwise(self) -> Generator[RecordedCall]:
        """Yield calls in which one argument is kept as it is, or its lists are repeated too.

        A size may equal the batch by chance: the number of layers, say, that a scale is given for.
        """
        doubled, batch = self.doubled().arguments, self.batch
        for name, item in self.arguments.items():
            kept = {**doubled, name: item}
            if _tensors_differ(item, doubled[name]):
                yield RecordedCall(kept)
            if isinstance(item, (list, tuple)) and len(item) == batch:
                yield RecordedCall({**doubled, name: type(item)([*item, *item])})


def _doubled(item: Any, batch: int, made: dict[int, Tensor]) -> Any:
    """Return ``item`` with its rows twice; a tensor that is given twice is one input for Dynamo."""
    if isinstance(item, Tensor):
        if not item.dim() or item.shape[0] != batch:
            return item
        return made.setdefault(id(item), _twice(item))
    if isinstance(item, (tuple, list)):
        return type(item)(_doubled(part, batch, made) for part in item)
    if isinstance(item, dict):
        return {key: _doubled(part, batch, made) for key, part in item.items()}
    return item


def _twice(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with its rows twice, in its layout, which a graph may depend on.

    Pipelines expand one timestep to a batch: then the rows lie at one place.
    """
    if tensor.stride(0) == 0:
        return tensor[:1].expand(2 * len(tensor), *tensor.shape[1:])
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    doubled = torch.cat([tensor.permute(order)] * 2, order.index(0))
    return doubled.permute([order.index(dim) for dim in range(tensor.dim())])


def _tensors_differ(one: Any, other: Any) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return any(a is not b for a, b in pairs)


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


def capture_doubled(
    model: nn.Module, call: RecordedCall, timestep: str = "timestep"
) -> CapturedCall:
    """Capture ``model``, called with ``call`` at twice its batch.

    Raises:
        ConfigError: the model does not take it.
    """
    try:
        return capture_call(model, call.doubled(), timestep)
    except ConfigError:
        raise
    except Exception as error:  # of the model's own code, about its arguments
        plain = plain_module(model)
        for other in call.doubled_otherwise():
            if _takes(plain, other, call.batch):
                return capture_call(model, other, timestep)
        said = str(error).strip() or type(error).__name__
        raise ConfigError(
            "the model does not take twice the batch",
            where="a call whose tensors are repeated",
            got=said.splitlines()[0],
            expected="a batch in the first dimension of its tensors",
            remedy=FIX_BATCH,
        ) from error


def _takes(plain: nn.Module, call: RecordedCall, batch: int) -> bool:
    """Return whether the model takes a doubled call, and returns each of ``batch`` rows twice."""
    try:
        with torch.no_grad():
            found = pytree.tree_leaves(plain(**call.arguments))
    except Exception:  # of the model's own code: it does not
        log.debug("a doubled call was refused", exc_info=True)
        return False
    results = [item for item in found if isinstance(item, Tensor) and item.dim()]
    return bool(results) and all(
        len(item) == 2 * batch and _are_close(item[:batch], item[batch:]) for item in results
    )


def _are_close(one: Tensor, other: Tensor) -> bool:
    """Return whether two results differ by rounding alone, in half precision too."""
    return float((one - other).abs().max()) <= 1e-2 * float(one.abs().max())


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
