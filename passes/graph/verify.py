"""Check that a pass left a graph valid; a fault is our bug and shows the lines around it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ditfastattn.core.errors import VerifyError
from ditfastattn.passes.graph.ir import VIEWS, evaluate, graph_text, outputs
from ditfastattn.passes.graph.slots import read_slots, written_slots

_CONTEXT_LINES = 3

Signature = tuple[Any, ...]


def snapshot(module: GraphModule) -> dict[Node, Signature]:
    """Return what each node of a sound graph is, so that ``verify`` looks at changes alone."""
    return {node: _signature(node) for node in module.graph.nodes}


def _signature(node: Node) -> Signature:
    return node.target, node.args, node.kwargs, id(node.meta.get("val"))


def verify(
    module: GraphModule,
    inputs: int,
    results: int,
    after: str,
    trusted: dict[Node, Signature] | None = None,
) -> None:
    """Check ``module``: order, calling convention, shapes and dtypes, mutation, aliasing.

    Args:
        module: the graph.
        inputs: how many inputs the model itself has; cache inputs follow them.
        results: how many outputs the model itself has; cache outputs follow them.
        after: the passes run so far, for the message.
        trusted: nodes known to be sound; they are not computed again unless they have changed,
            and those found sound are added.

    Raises:
        VerifyError: something does not hold.
    """
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"after {after}: the graph is not well formed: {error}") from error
    _check_signature(module, inputs, results, after)
    known = {} if trusted is None else trusted
    for node in module.graph.nodes:
        if node.op == "call_function" and known.get(node) != _signature(node):
            _check_call(module, node, after)
            known[node] = _signature(node)
    _check_aliases(module, after)


def _check_signature(module: GraphModule, inputs: int, results: int, after: str) -> None:
    graph = module.graph
    found = len(graph.find_nodes(op="placeholder"))
    if found != inputs + len(read_slots(graph)):
        raise VerifyError(
            f"after {after}: {found} inputs, expected {inputs} and {read_slots(graph)}"
        )
    if len(outputs(graph)) != results + len(written_slots(graph)):
        raise VerifyError(
            f"after {after}: {len(outputs(graph))} outputs, expected {results} and "
            f"{written_slots(graph)}"
        )


def _check_call(module: GraphModule, node: Node, after: str) -> None:
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise _fault(module, node, after, f"{node.target} writes in place")
    if "val" not in node.meta:
        raise _fault(module, node, after, "it carries no fake value")
    try:
        expected = evaluate(module.graph, node.target, node.args, node.kwargs)
    except Exception as error:
        raise _fault(module, node, after, f"it cannot run: {error}") from error
    for got, wanted in zip(_leaves(node.meta["val"]), _leaves(expected), strict=True):
        if _kind(got) != _kind(wanted):
            reason = f"it claims {_kind(got)} and computes {_kind(wanted)}"
            raise _fault(module, node, after, reason)


def _leaves(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _kind(result: Any) -> Any:
    if not isinstance(result, Tensor):
        return type(result)
    return tuple(result.shape), result.dtype, result.device


def _check_aliases(module: GraphModule, after: str) -> None:
    """Refuse a cache output that is a view of an input: it could change before it is read."""
    graph = module.graph
    written = outputs(graph)[len(outputs(graph)) - len(written_slots(graph)) :]
    for node in written:
        origin = node
        while isinstance(origin, Node) and origin.target in VIEWS:
            origin = origin.args[0]
        if isinstance(origin, Node) and origin.op == "placeholder":
            raise _fault(module, origin, after, "a cache output is a view of this input")


def _fault(module: GraphModule, node: Node, after: str, reason: str) -> VerifyError:
    lines = graph_text(module.graph).splitlines()
    at = list(module.graph.nodes).index(node)
    shown = range(max(0, at - _CONTEXT_LINES), min(len(lines), at + _CONTEXT_LINES + 1))
    context = "\n".join(f"{'>' if line == at else ' '} {lines[line]}" for line in shown)
    return VerifyError(f"after {after}: node {node.name}: {reason}\n{context}")
