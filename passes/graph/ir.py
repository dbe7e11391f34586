"""Read and build ATen-level FX graphs.

Every node carries ``meta["val"]``, the fake tensor it computes. Passes add nodes with ``insert``
only, which fills it and keeps the stack trace of the code that the node stands for.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from ditfastattn.passes.graph.fake_values import fake_mode
from ditfastattn.passes.graph.kinds import result_of
from ditfastattn.passes.graph.lazy_code import lazy_module

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
FLEX_ATTENTION = flex_attention  # with a mask, or scores, of the model's own making
SCALINGS = (aten.div.Tensor, aten.mul.Tensor, aten.div.Scalar, aten.mul.Scalar)
VIEWS = (
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.slice.Tensor,
    aten.unsqueeze.default,
    aten.select.int,
    aten.expand.default,
)

_KEPT_META = ("stack_trace", "nn_module_stack")


def value(node: Any) -> Tensor:
    """Return the fake tensor that ``node`` computes; reading its data is not possible."""
    result: Tensor = node.meta["val"]
    return result


def argument(node: Node, position: int, keyword: str, default: Any = None) -> Any:
    """Return an argument of a call, given by position or by keyword, or its default."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword, default)


def insert(
    graph: Graph,
    target: Any,
    args: tuple[Any, ...],
    like: Node,
    kwargs: dict[str, Any] | None = None,
) -> Node:
    """Add a call at the graph's insertion point, with its fake value and the origin of ``like``."""
    node = graph.call_function(target, args, kwargs or {})
    node.meta["val"] = result_of(node)
    for key in _KEPT_META:
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def add_input(graph: Graph, name: str, like: Tensor) -> Node:
    """Add a graph input called ``name`` after the existing ones, shaped like ``like``."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    with fake_mode(graph):
        node.meta["val"] = torch.empty_like(like, memory_format=torch.contiguous_format)
    return node


def add_output(graph: Graph, node: Node) -> None:
    """Return ``node`` from the graph, after its other outputs."""
    output = graph.output_node()
    output.args = ((*outputs(graph), node),)


def outputs(graph: Graph) -> tuple[Argument, ...]:
    """Return what the graph returns, as a flat tuple."""
    returned = graph.output_node().args[0]
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def clone(module: GraphModule) -> GraphModule:
    """Copy the graph; node names, metadata and attributes (constants) are shared."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    returned = graph.graph_copy(module.graph, copies)
    graph.output(returned)
    return lazy_module(module, graph)


def constant_tensors(module: GraphModule) -> list[Tensor]:
    """Return the tensors that the graph holds as constants, in graph order."""
    nodes = module.graph.find_nodes(op="get_attr")
    constants = (getattr(module, str(node.target)) for node in nodes)
    return [constant for constant in constants if isinstance(constant, Tensor)]


def find(graph: Graph, name: str) -> Node:
    """Return the node called ``name``; names survive ``clone``."""
    for node in graph.nodes:
        if node.name == name:
            found: Node = node
            return found
    raise LookupError(f"no node is called {name!r}")


def calls(graph: Graph, *targets: Any) -> list[Node]:
    """Return the nodes that call one of ``targets``, in graph order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def users_outside(node: Node, inside: Iterable[Node]) -> list[Node]:
    """Return the users of ``node`` that are not among ``inside``."""
    members = set(inside)
    return [user for user in node.users if user not in members]


def replace_uses(old: Node, new: Node, keep: Iterable[Node] = ()) -> None:
    """Make every user of ``old``, except those in ``keep``, use ``new``."""
    kept = set(keep)
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in kept)


def graph_text(graph: Graph) -> str:
    """Print the graph for people and golden tests: one line per node, numbered by position."""
    numbers: dict[Node, str] = {}
    lines: list[str] = []
    for position, node in enumerate(graph.nodes):
        numbers[node] = f"%{position}"
        if node.op == "placeholder":
            lines.append(f"%{position} = input {node.target}: {_type_text(node)}")
        elif node.op == "output":
            lines.append(f"return {_argument_text(outputs(graph), numbers)}")
        else:
            arguments = [_argument_text(argument, numbers) for argument in node.args]
            arguments += [f"{k}={_argument_text(v, numbers)}" for k, v in node.kwargs.items()]
            lines.append(
                f"%{position} = {_target_text(node)}({', '.join(arguments)}): {_type_text(node)}"
            )
    return "\n".join(lines)


def _target_text(node: Node) -> str:
    if node.op == "get_attr":
        return f"constant {node.target}"
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target)


def _type_text(node: Node) -> str:
    result = node.meta.get("val")
    if isinstance(result, Tensor):
        return f"{str(result.dtype).removeprefix('torch.')}{list(result.shape)}"
    return type(result).__name__


def _argument_text(argument: Any, numbers: Mapping[Node, str]) -> str:
    if isinstance(argument, Node):
        return numbers.get(argument, f"%?{argument.name}")
    if isinstance(argument, (tuple, list)):
        return "[" + ", ".join(_argument_text(item, numbers) for item in argument) + "]"
    return str(argument)
