"""State, per operator, which inputs' halves suffice to compute one half of a node's batch.

The rules move slices that take half of the batch above nodes (``halved_call``), and find the nodes
whose halves follow from the halves of others (``halved_inputs``). They are exact: an operator
without a rule may mix rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ditfastattn.passes.graph.ir import ATTENTION, argument, aten, value
from ditfastattn.passes.windows.forms import WINDOWED

Args = tuple[Any, ...]
TakeHalf = Callable[[Node], Node]  # returns the node that holds one half of another's batch
Rule = Callable[[Node, TakeHalf], Args | None]


@dataclass(frozen=True)
class HalvedCall:
    """Hold the arguments of a call that computes one half of a node's batch."""

    args: Args
    kwargs: dict[str, Any]


def halved_call(node: Node, take_half: TakeHalf) -> HalvedCall | None:
    """Return the call that computes one half of ``node``; None where no rule applies."""
    rule = _RULES.get(node.target)
    if rule is None or not _even_batch(node):
        return None
    args = rule(node, take_half)
    if args is None:
        return None
    batch = value(node).shape[0]

    def halved(source: Node) -> Node:
        return take_half(source) if value(source).shape[:1] == (batch,) else source

    kwargs = {
        key: map_arg(item, halved)
        for key, item in node.kwargs.items()
        if key != "output_size"  # a hint, of the whole batch
    }
    return HalvedCall(args, kwargs)


def halved_split(split: Node, take_half: TakeHalf) -> HalvedCall | None:
    """Return the call that splits one half of what ``split`` splits; None where no rule applies."""
    if split.target not in SPLITS:
        return None
    args = _first_argument(split, take_half)
    return None if args is None else HalvedCall(args, dict(split.kwargs))


def halved_inputs(node: Node) -> list[Node]:
    """Return the nodes whose first halves suffice to compute the first half of ``node``.

    Of a piece of a split, that is the split's source. Empty where no rule applies.
    """
    found: list[Node] = []

    def take_half(source: Node) -> Node:
        found.append(source)
        return source

    split = node.args[0] if node.target is operator.getitem else None
    if isinstance(split, Node):
        call = halved_split(split, take_half)
    else:
        call = halved_call(node, take_half)
    return [] if call is None else found


def _even_batch(node: Node) -> bool:
    result = node.meta.get("val")
    return isinstance(result, Tensor) and result.dim() > 0 and result.shape[0] % 2 == 0


def _elementwise(node: Node, take_half: TakeHalf) -> Args | None:
    """Halve the operands that have the batch; leave those that are broadcast over it."""
    shape = value(node).shape

    def halved(operand: Node) -> Node:
        operand_shape = value(operand).shape
        has_batch = len(operand_shape) == len(shape) and operand_shape[0] == shape[0]
        return take_half(operand) if has_batch else operand

    return map_arg(node.args, halved)


def _first_argument(node: Node, take_half: TakeHalf) -> Args | None:
    """Halve the first operand of an operator that works on each row alone."""
    source = node.args[0]
    if not isinstance(source, Node) or value(source).shape[0] % 2:
        return None
    if not _leaves_batch_alone(node, value(source)):
        return None
    return (take_half(source), *node.args[1:])


def _leaves_batch_alone(node: Node, source: Tensor) -> bool:
    """Return whether the dimensions that ``node`` names exclude the batch (dimension 0)."""
    positions = _DIM_ARGUMENTS.get(node.target)
    if positions is None:
        return True
    rank = source.dim() + (node.target is aten.unsqueeze.default)
    dims: list[int] = []
    for position, (keyword, default) in positions.items():
        item = argument(node, position, keyword, default)
        if item is None:  # "all dimensions"
            return False
        dims.extend(item if isinstance(item, (list, tuple)) else [item])
    return all(dim % rank != 0 for dim in dims)


def _layer_norm(node: Node, take_half: TakeHalf) -> Args | None:
    source, normalized = node.args[0], node.args[1]
    if not isinstance(source, Node) or len(normalized) >= value(source).dim():  # type: ignore[arg-type]
        return None
    return (take_half(source), *node.args[1:])


def _reshape(node: Node, take_half: TakeHalf) -> Args | None:
    """Halve a reshape: in row-major order the first half of the rows stays the first half."""
    source, size = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    if not isinstance(source, Node) or value(source).dim() == 0 or value(source).shape[0] % 2:
        return None
    size[0] = size[0] if size[0] == -1 else size[0] // 2
    return (take_half(source), size)


def _expand(node: Node, take_half: TakeHalf) -> Args | None:
    source, size = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    if not isinstance(source, Node) or value(source).dim() != len(size):
        return None
    size[0] = size[0] if size[0] == -1 else size[0] // 2
    has_batch = value(source).shape[0] == value(node).shape[0]
    return (take_half(source) if has_batch else source, size)


def _permute(node: Node, take_half: TakeHalf) -> Args | None:
    source, dims = node.args
    if not isinstance(source, Node) or dims[0] != 0:  # type: ignore[index]
        return None
    return (take_half(source), dims)


def _repeat(node: Node, take_half: TakeHalf) -> Args | None:
    """Halve the source of a repetition along any dimension: copies of a row stay together."""
    source, repeats = node.args[0], node.args[1]
    dim = argument(node, 2, "dim")
    if not isinstance(source, Node) or dim is None or value(source).shape[0] % 2:
        return None
    return (take_half(source), repeats, dim)


def _concatenate(node: Node, take_half: TakeHalf) -> Args | None:
    dim = int(argument(node, 1, "dim", 0))
    if dim % value(node).dim() == 0:
        return None
    return ([take_half(part) for part in argument(node, 0, "tensors")], dim)


def _scatter(node: Node, take_half: TakeHalf) -> Args | None:
    """Halve both the base and what is written into it."""
    base, source, *rest = node.args
    if not isinstance(base, Node) or not isinstance(source, Node):
        return None
    dim = int(argument(node, 2, "dim", 0)) % value(node).dim()
    return None if dim == 0 else (take_half(base), take_half(source), *rest)


def _batched_product(node: Node, take_half: TakeHalf) -> Args | None:
    rank = value(node).dim()
    if rank < 3 or any(value(operand).dim() != rank for operand in node.all_input_nodes):
        return None
    return _elementwise(node, take_half)


SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)

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
    *(target for target in _DIM_ARGUMENTS if target not in SPLITS),
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
