"""Lower a step variant's graph to something that runs: Inductor, or plain eager for tests."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule, Node

from ditfastattn.passes.graph.fake_values import fake_mode
from ditfastattn.passes.graph.ir import outputs
from ditfastattn.passes.graph.outline import outline
from ditfastattn.passes.graph.region import Region, freed_after
from ditfastattn.passes.windows.lower_windows import lower_windows

log = logging.getLogger(__name__)

RunnableGraph = Callable[[Sequence[Tensor]], Sequence[Any]]
_COMPILATIONS = 256  # of one model in one process; Dynamo's 8 are used up by a few plans

# What is compiled, for as long as some step variant runs it.
_compiled: weakref.WeakValueDictionary[tuple[Any, ...], Callable[..., Any]] = (
    weakref.WeakValueDictionary()
)
_compile_lock = threading.Lock()


class Lowering(StrEnum):
    """Name the code generator of the step variants."""

    INDUCTOR = "inductor"
    EAGER = "eager"


def lower(
    module: GraphModule,
    args: Sequence[Tensor],
    lowering: Lowering,
    inductor: dict[str, Any],
    outlined: bool = True,
) -> RunnableGraph:
    """Return a callable over the flat inputs of ``module``, which it may change.

    Args:
        module: the graph of a step variant.
        args: an example of its inputs.
        lowering: the code generator.
        inductor: Inductor's own configuration, as ``torch.compile(options=...)`` takes it.
        outlined: compile equal blocks once, for all variants; not with CUDA graphs, for which one
            graph per step is better.
    """
    if lowering is Lowering.EAGER:
        module.recompile()
        return lambda inputs: module(*inputs)
    for reason in lower_windows(module):
        log.info("window attention stays a masked full attention: %s", reason)
    if outlined and not inductor.get("triton.cudagraphs"):
        return _lower_regions(module, args, inductor)
    compiled = _compile(module, args, inductor)
    return lambda inputs: compiled(*inputs)


def _compile(
    module: GraphModule, args: Sequence[Tensor], inductor: dict[str, Any]
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx  # a second's import, seldom needed

    # Inductor reads and writes its cache on disk only where it is told the graph's environment.
    with torch.no_grad(), tracing(TracingContext(fake_mode(module.graph))):
        compiled: Callable[..., Any] = compile_fx(  # type: ignore[assignment]  # a union in torch
            module, list(args), config_patches=inductor or None
        )
    return compiled


@dataclass(frozen=True, slots=True)
class _Call:
    """Run a region on the values at ``reads``; nothing needs those at ``frees`` any more."""

    run: Callable[..., Any]
    reads: tuple[int, ...]
    frees: tuple[int, ...]


@dataclass(frozen=True)
class OutlinedStep:
    """Run a step as a straight list of calls over one list of values.

    The list begins with the inputs and the constants; each call appends its results.
    """

    constants: tuple[Any, ...]
    calls: tuple[_Call, ...]
    returned: tuple[int, ...]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Any]:
        """Run one step on its flat inputs."""
        values: list[Any] = [*inputs, *self.constants]
        for call in self.calls:
            results = call.run(*[values[index] for index in call.reads])
            for index in call.frees:
                values[index] = None
            values += results
        return [values[index] for index in self.returned]


def _lower_regions(
    module: GraphModule, args: Sequence[Tensor], inductor: dict[str, Any]
) -> OutlinedStep:
    graph = module.graph
    regions = outline(module, args)
    inputs: list[Any] = graph.find_nodes(op="placeholder")
    literals = [result for result in outputs(graph) if not isinstance(result, Node)]
    constants = [node for node in graph.find_nodes(op="get_attr") if _is_tensor(module, node)]
    order = [*inputs, *constants, *literals, *(node for r in regions for node in r.outputs)]
    place = {item: index for index, item in enumerate(order)}
    calls = [
        _Call(
            _compile_region(region, module, inductor),
            reads=tuple(place[node] for node in region.inputs),
            frees=tuple(place[node] for node in freed),
        )
        for region, freed in zip(regions, freed_after(regions, graph), strict=True)
    ]
    log.info("outline: %d regions, %d distinct", len(regions), len({r.key for r in regions}))
    return OutlinedStep(
        constants=(*(getattr(module, str(node.target)) for node in constants), *literals),
        calls=tuple(calls),
        returned=tuple(place[result] for result in outputs(graph)),
    )


def compiled_regions() -> int:
    """Return how many distinct regions are compiled in this process."""
    return len(_compiled)


def _is_tensor(module: GraphModule, node: Node) -> bool:
    return isinstance(getattr(module, str(node.target)), Tensor)


def _compile_region(
    region: Region, module: GraphModule, inductor: dict[str, Any]
) -> Callable[..., Any]:
    """Return what is compiled for the key of ``region``, compiling it at first sight."""
    key = (region.key, repr(sorted(inductor.items())), torch.get_num_threads())
    with _compile_lock:
        compiled = _compiled.get(key)
        if compiled is None:
            extracted = region.extract(module)
            examples = [n.meta["val"] for n in extracted.graph.find_nodes(op="placeholder")]
            compiled = _compiled[key] = _compile(extracted, examples, inductor)
        return compiled


@contextmanager
def many_compilations() -> Generator[None]:
    """Let Dynamo compile one class of models many times.

    At its limit Dynamo would go on uncompiled, dense, or raise an error.
    """
    with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS):
        yield


def expect_many_compilations() -> None:
    """Let Dynamo compile one class of models many times from now on, in this process.

    For models that ``torch.compile`` was given outside of ``many_compilations``: each plan is a
    backend of its own to Dynamo.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILATIONS)
