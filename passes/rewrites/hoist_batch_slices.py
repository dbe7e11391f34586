"""Move "one half of the batch" upward, through everything that works row by row.

Before::

    %3 = aten.linear.default(%0, %1, %2): float32[2, 64, 32]
    %4 = aten.slice.Tensor(%3, 0, 0, 1): float32[1, 64, 32]

After::

    %3 = aten.slice.Tensor(%0, 0, 0, 1): float32[1, 64, 16]
    %4 = aten.linear.default(%3, %1, %2): float32[1, 64, 32]

A slice moves through a node only when every user of the node wants the same half: work is halved,
never repeated. The rules are exact, so a slice that stops early costs speed and not correctness.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ditfastattn.passes.graph.ir import ATTENTION, argument, aten, calls, insert, value
from ditfastattn.passes.rewrites.base import PassResult
from ditfastattn.passes.rewrites.eliminate_dead_code import EliminateDeadCode
from ditfastattn.passes.windows.forms import WINDOWED

_HALF = "batch_half"  # meta key: 0 or 1, on slices that take the first or second half

Rule = Callable[[Node, Callable[[Node], Node]], "tuple[Any, ...] | None"]


@dataclass(frozen=True)
class HoistBatchSlices:
    """Move batch-half slices as far up as is exact and saves work."""

    name: str = "hoist-batch-slices"
    requires: tuple[str, ...] = ("share-across-cfg",)

    def run(self, module: GraphModule) -> PassResult:
        """Erase dead users, which would hold slices up, then move slices until none can."""
        graph = module.graph
        changed = EliminateDeadCode().run(module).changed
        pending = [node for node in graph.nodes if _HALF in node.meta]
        while pending:
            node = pending.pop()
            if not node.users:  # it has been merged or sunk already
                continue
            moved = _sink(graph, node)
            if moved is not None:
                changed += 1
                pending.extend(moved)
        return PassResult(changed, tuple(_stopped(graph)))


def insert_half(graph: Graph, node: Node, second: bool) -> Node:
    """Return the slice that takes one half of ``node`` along dimension 0, made at most once."""
    for user in node.users:
        if user.meta.get(_HALF) is second:
            return user
    rows = value(node).shape[0]
    bounds = (rows // 2, rows) if second else (0, rows // 2)
    with graph.inserting_after(_last_input(graph) if node.op == "placeholder" else node):
        half = insert(graph, aten.slice.Tensor, (node, 0, *bounds), node)
    half.meta[_HALF] = second
    return half


def halved_inputs(node: Node) -> list[Node]:
    """Return the nodes of whose first halves the first half of ``node`` is computed.

    None of them where no rule tells; of an item of a split, the split's source.
    """
    halved: list[Node] = []

    def take_half(source: Node) -> Node:
        halved.append(source)
        return source

    split = node.args[0] if node.target is operator.getitem else None
    if isinstance(split, Node):
        known = split.target in _SPLITS and _first_argument(split, take_half) is not None
        return halved if known else []
    rule = _RULES.get(node.target)
    if rule is None or not _even_batch(node) or rule(node, take_half) is None:
        return []
    for item in node.kwargs.values():
        map_arg(item, lambda source: _narrow_keyword(node, source, take_half))
    return halved


def _last_input(graph: Graph) -> Node:
    last: Node = graph.find_nodes(op="placeholder")[-1]
    return last


def _sink(graph: Graph, half: Node) -> list[Node] | None:
    """Move ``half`` above the node it slices; return the slices that may move next."""
    source, second = half.args[0], half.meta[_HALF]
    if not isinstance(source, Node) or source.op != "call_function":
        return None
    if any(user.meta.get(_HALF) is not second for user in source.users):
        return None
    made: list[Node] = []

    def take_half(node: Node) -> Node:
        made.append(insert_half(graph, node, second))
        return made[-1]

    narrowed = _narrow(graph, source, take_half)
    if narrowed is None:
        return None
    half.replace_all_uses_with(narrowed)
    graph.erase_node(half)
    for node in _erase_dead(graph, source):
        made.extend(user for user in node.users if user.meta.get(_HALF) is second)
    return made


def _erase_dead(graph: Graph, node: Node) -> list[Node]:
    """Erase ``node`` and what only it used; return the nodes that lost a user and live on."""
    if node.users or node.op != "call_function":
        return [node]
    sources = node.all_input_nodes
    graph.erase_node(node)
    return [alive for source in sources for alive in _erase_dead(graph, source)]


def _narrow(graph: Graph, node: Node, take_half: Callable[[Node], Node]) -> Node | None:
    """Recompute ``node`` on halves of its inputs, or return None where no rule applies."""
    if node.target is operator.getitem:
        return _narrow_item(graph, node, take_half)
    rule = _RULES.get(node.target)
    if rule is None or not _even_batch(node):
        return None
    arguments = rule(node, take_half)
    if arguments is None:
        return None
    kwargs = {
        key: _narrow_keyword(node, item, take_half)
        for key, item in node.kwargs.items()
        if key != "output_size"  # a hint, of the whole batch
    }
    with graph.inserting_before(node):
        return insert(graph, node.target, arguments, node, kwargs)


def _narrow_item(graph: Graph, node: Node, take_half: Callable[[Node], Node]) -> Node | None:
    """Narrow one piece of a chunk or split."""
    pieces = node.args[0]
    if not isinstance(pieces, Node) or pieces.target not in _SPLITS:
        return None
    arguments = _first_argument(pieces, take_half)
    if arguments is None:
        return None
    with graph.inserting_before(node):
        narrowed = insert(graph, pieces.target, arguments, pieces, dict(pieces.kwargs))
        return insert(graph, operator.getitem, (narrowed, node.args[1]), node)


def _narrow_keyword(node: Node, item: Any, take_half: Callable[[Node], Node]) -> Any:
    batch = value(node).shape[0]
    return map_arg(item, lambda n: take_half(n) if value(n).shape[:1] == (batch,) else n)


def _even_batch(node: Node) -> bool:
    result = node.meta.get("val")
    return isinstance(result, Tensor) and result.dim() > 0 and result.shape[0] % 2 == 0


def _elementwise(node: Node, take_half: Callable[[Node], Node]) -> tuple[Any, ...] | None:
    """Halve the operands that have the batch; leave those that are broadcast over it."""
    shape = value(node).shape

    def narrow(operand: Node) -> Node:
        operand_shape = value(operand).shape
        has_batch = len(operand_shape) == len(shape) and operand_shape[0] == shape[0]
        return take_half(operand) if has_batch else operand

    return map_arg(node.args, narrow)


def _first_argument(node: Node, take_half: Callable[[Node], Node]) -> tuple[Any, ...] | None:
    """Halve the first operand of an operator that keeps dimension 0 apart."""
    source = node.args[0]
    if not isinstance(source, Node) or value(source).shape[0] % 2:
        return None
    if not _leaves_batch_alone(node, value(source)):
        return None
    return (take_half(source), *node.args[1:])


def _leaves_batch_alone(node: Node, source: Tensor) -> bool:
    """Tell whether the dimensions that ``node`` names exclude the batch (dimension 0)."""
    positions = _DIM_ARGUMENTS.get(node.target)
    if positions is None:
        return True
    rank = source.dim() + (node.target is aten.unsqueeze.default)
    dims: list[int] = []
    for position, (keyword, default) in positions.items():
        item: Any = (
            node.args[position] if len(node.args) > position else node.kwargs.get(keyword, default)
        )
        if item is None:  # "all dimensions"
            return False
        dims.extend(item if isinstance(item, (list, tuple)) else [item])
    return all(dim % rank != 0 for dim in dims)


def _layer_norm(node: Node, take_half: Callable[[Node], Node]) -> tuple[Any, ...] | None:
    source, normalized = node.args[0], node.args[1]
    if not isinstance(source, Node) or len(normalized) >= value(source).dim():  # type: ignore[arg-type]
        return None
    return (take_half(source), *node.args[1:])


def _reshape(node: Node, take_half: Callable[[Node], Node]) -> tuple[Any, ...] | None:
    """Halve a reshape: in row-major order the first half of the rows stays the first half."""
    source, size = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    if not isinstance(source, Node) or value(source).dim() == 0 or value(source).shape[0] % 2:
        return None
    size[0] = size[0] if size[0] == -1 else size[0] // 2
    return (take_half(source), size)


def _expand(node: Node, take_half: Callable[[Node], Node]) -> tuple[Any, ...] | None:
    source, size = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    if not isinstance(source, Node) or value(source).dim() != len(size):
        return None
    size[0] = size[0] if size[0] == -1 else size[0] // 2
    has_batch = value(source).shape[0] == value(node).shape[0]
    return (take_half(source) if has_batch else source, size)


def _permute(node: Node, take_half: Callable[[Node], Node]) -> tuple[Any, ...] | None:
    source, dims = node.args
    if not isinstance(source, Node) or dims[0] != 0:  # type: ignore[index]
        return None
    return (take_half(source), dims)


def _repeat(node: Node, take_half: Callable[[Node], Node]) -> tuple[Any, ...] | None:
    """Halve what each row is repeated of, one beside the other."""
    source, repeats = node.args[0], node.args[1]
    dim = argument(node, 2, "dim")
    if not isinstance(source, Node) or dim is None or value(source).shape[0] % 2:
        return None
    return (take_half(source), repeats, dim)


def _concatenate(node: Node, take_half: Callable[[Node], Node]) -> tuple[Any, ...] | None:
    dim = int(argument(node, 1, "dim", 0))
    if dim % value(node).dim() == 0:
        return None
    return ([take_half(part) for part in argument(node, 0, "tensors")], dim)


def _scatter(node: Node, take_half: Callable[[Node], Node]) -> tuple[Any, ...] | None:
    """Halve both what is written into and what is written."""
    base, source, *rest = node.args
    if not isinstance(base, Node) or not isinstance(source, Node):
        return None
    dim = int(argument(node, 2, "dim", 0)) % value(node).dim()
    return None if dim == 0 else (take_half(base), take_half(source), *rest)


def _batched_product(node: Node, take_half: Callable[[Node], Node]) -> tuple[Any, ...] | None:
    rank = value(node).dim()
    if rank < 3 or any(value(operand).dim() != rank for operand in node.all_input_nodes):
        return None
    return _elementwise(node, take_half)


_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)

# Which arguments name dimensions: position -> (keyword, default).
_DIM_ARGUMENTS: dict[Any, dict[int, tuple[str, Any]]] = {
    aten.transpose.int: {1: ("dim0", 0), 2: ("dim1", 0)},
    aten.unsqueeze.default: {1: ("dim", 0)},
    aten.squeeze.dim: {1: ("dim", 0)},
    aten.select.int: {1: ("dim", 0)},
    aten.slice.Tensor: {1: ("dim", 0)},
    aten.chunk.default: {2: ("dim", 0)},
    aten.split.Tensor: {2: ("dim", 0)},
    aten.split_with_sizes.default: {2: ("dim", 0)},
    aten.unbind.int: {1: ("dim", 0)},
    aten.flatten.using_ints: {1: ("start_dim", 0)},
    aten.unflatten.int: {1: ("dim", 0)},
    aten.softmax.int: {1: ("dim", 0)},
    aten.mean.dim: {1: ("dim", None)},
    aten.sum.dim_IntList: {1: ("dim", None)},
}

_ELEMENTWISE = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.rsub.Scalar,
    aten.pow.Tensor_Scalar,
    aten.neg.default,
    aten.exp.default,
    aten.sin.default,
    aten.cos.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.relu.default,
    aten.silu.default,
    aten.gelu.default,
    aten.clamp.default,
    aten.where.self,
    aten.to.dtype,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
)

_FIRST_ARGUMENT = (
    aten.linear.default,
    aten.conv2d.default,
    *(target for target in _DIM_ARGUMENTS if target not in _SPLITS),
)

_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_FIRST_ARGUMENT, _first_argument),
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _layer_norm,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.repeat_interleave.self_int: _repeat,
    aten.cat.default: _concatenate,
    aten.slice_scatter.default: _scatter,
    aten.select_scatter.default: _scatter,
    aten.matmul.default: _batched_product,
    aten.bmm.default: _batched_product,
    ATTENTION: _elementwise,
    **dict.fromkeys(WINDOWED, _elementwise),
}


def _stopped(graph: Graph) -> list[str]:
    """Name what slices could not pass although nothing else needs its whole batch."""
    halves = [node for node in calls(graph, aten.slice.Tensor) if _HALF in node.meta]
    sources = (half.all_input_nodes[0] for half in halves)
    return [
        f"{source.name}: no rule moves half of the batch above {source.target}"
        for source in sources
        if source.op == "call_function" and len(source.users) == 1
    ]
