"""Replace complex numbers, which ONNX lacks, by their real and imaginary parts.

Before: ``%z = aten.view_as_complex.default(%x)``, ``%y = aten.mul.Tensor(%z, %turn)``
After: the parts of both as nodes of their own, ``%y`` as four products, a difference and a sum

torch knows for each operator what it does to the parts. Graphs take and return complex numbers as
pairs of real ones, ``[..., 2]``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.decompose import copy_trace
from ditfastattn.passes.graph.fake_values import evaluate, fake_mode
from ditfastattn.passes.graph.ir import aten, insert, outputs, value

_Parts = dict[Node, tuple[Node, Node]]


def split_complex(module: GraphModule, static: Collection[int]) -> int:
    """Take apart in place what is complex; return how many calls were replaced.

    Inputs at the positions ``static`` may be complex; others, and results, become pairs.

    Raises:
        ConfigError: nothing is known of an operator.
    """
    pair_boundary(module, static)
    graph, parts = module.graph, _Parts()
    inputs = graph.find_nodes(op="placeholder")
    results: dict[Node, list[Any]] = {}
    replaced: list[Node] = []
    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr"):
            if _is_complex(node) and node.users:
                parts[node] = _of_constant(graph, node, inputs)
        elif node.op != "call_function":
            continue
        elif node.target is operator.getitem and node.args[0] in results:
            _stands_for(node, results[node.args[0]][node.args[1]], parts)
            replaced.append(node)
        elif _is_complex(node) or not parts.keys().isdisjoint(node.all_input_nodes):
            made = _apart(module, node, parts)
            replaced.append(node)
            if isinstance(node.meta["val"], Tensor):
                _stands_for(node, made[0], parts)
            else:
                results[node] = made
    for node in reversed(replaced):
        graph.erase_node(node)
    if replaced:
        module.recompile()
    return len(replaced)


def pair_boundary(module: GraphModule, static: Collection[int]) -> None:
    """Let inputs and results that are complex be pairs of real numbers, ``[..., 2]``, in place.

    Before: ``%z = input z: complex64[4]``, ``return [%y]``
    After: ``%z = input z: float32[4, 2]``, ``%1 = aten.view_as_complex.default(%z)``, and
    ``%2 = aten.view_as_real.default(%y)``, ``return [%2]``

    Inputs at the positions ``static`` stay complex.
    """
    graph = module.graph
    inputs = graph.find_nodes(op="placeholder")
    given = [node for at, node in enumerate(inputs) if at not in static and _is_complex(node)]
    for node in given:
        kind = value(node)
        with fake_mode(graph):
            node.meta["val"] = torch.empty((*kind.shape, 2), dtype=kind.real.dtype).to(kind.device)
        if not node.users:
            continue
        with graph.inserting_after(inputs[-1]):
            whole = insert(graph, aten.view_as_complex.default, (node,), node)
        node.replace_all_uses_with(whole, delete_user_cb=lambda user, own=whole: user is not own)
    end = graph.output_node()
    made: dict[Node, Node] = {}
    for node in {item for item in outputs(graph) if isinstance(item, Node) and _is_complex(item)}:
        with graph.inserting_before(end):
            made[node] = insert(graph, aten.view_as_real.default, (node,), node)
    if given or made:
        end.args = (tuple(made.get(item, item) for item in outputs(graph)),)  # type: ignore[arg-type]
        module.recompile()


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(item, Tensor) and item.is_complex() for item in values)


def _stands_for(node: Node, made: Any, parts: _Parts) -> None:
    if isinstance(made, Node):
        node.replace_all_uses_with(made)
    else:
        parts[node] = made


def _of_constant(graph: Graph, node: Node, inputs: list[Node]) -> tuple[Node, Node]:
    """Return the parts of a weight or constant, which are computed at export."""
    last = inputs[-1] if node.op == "placeholder" else node
    found: list[Node] = []
    with graph.inserting_after(last):
        for target in (aten.imag.default, aten.real.default):  # each right behind ``last``
            found.append(graph.call_function(target, (node,)))
            found[-1].meta["val"] = evaluate(graph, target, (node,), {})
    return found[1], found[0]


def _apart(module: GraphModule, node: Node, parts: _Parts) -> list[Any]:
    """Insert what the call ``node`` does to the parts; return its results, parts as pairs."""
    from torch._subclasses.complex_tensor import ComplexTensor

    sources = node.all_input_nodes
    flat = [part for source in sources for part in parts.get(source, (source,))]
    pairs: list[bool] = []

    def call(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        made = {
            source: ComplexTensor(next(given), next(given)) if source in parts else next(given)
            for source in sources
        }
        args: Any = map_arg(node.args, made.__getitem__)
        kwargs: Any = map_arg(node.kwargs, made.__getitem__)
        target: Any = _MADE.get(node.target, node.target)
        found = target(*args, **kwargs)
        several = found if isinstance(found, (tuple, list)) else [found]
        pairs[:] = [isinstance(item, ComplexTensor) for item in several]
        return [
            part
            for item in several
            for part in ((item.re, item.im) if isinstance(item, ComplexTensor) else (item,))
        ]

    try:
        with fake_mode(module.graph), torch.no_grad():
            examples = [torch.empty_like(source.meta["val"]) for source in flat]
            trace = make_fx(call)(*examples)
        trace.graph.eliminate_dead_code()  # such as questions for the kind of memory
    except (TypeError, NotImplementedError) as error:
        raise ConfigError(
            "an operator on complex numbers has no ONNX form",
            where=str(node.meta.get("stack_trace", node.name)).strip(),
            got=node.target,
            remedy="write the model with real numbers, or run the plan in torch",
        ) from error
    copied = iter(copy_trace(module, node, trace, flat))
    return [(next(copied), next(copied)) if pair else next(copied) for pair in pairs]


def _of_angle(size: Tensor, angle: Tensor) -> Any:
    from torch._subclasses.complex_tensor import ComplexTensor

    return ComplexTensor(size * angle.cos(), size * angle.sin())


def _of_parts(real: Tensor, imaginary: Tensor) -> Any:
    from torch._subclasses.complex_tensor import ComplexTensor

    return ComplexTensor(real, imaginary)


def _of_pairs(pairs: Tensor) -> Any:
    return _of_parts(pairs.select(-1, 0), pairs.select(-1, 1))


_MADE: dict[Any, Callable[..., Any]] = {  # complex numbers of real ones
    aten.polar.default: _of_angle,
    aten.complex.default: _of_parts,
    aten.view_as_complex.default: _of_pairs,
}
