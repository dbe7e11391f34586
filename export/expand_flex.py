"""Expand FlexAttention into products and a softmax under its mask, for graphs that leave Python.

Before: ``%5 = flex_attention(%query, %key, %value, %score_mod, (..., %mask_mod), 0.35, {})``
After: the scores of all pairs, ``%score_mod`` and ``%mask_mod`` over all pairs, softmax, product

This is what torch itself computes where nothing compiles it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._higher_order_ops.flex_attention import math_attention
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.graph.fake_values import fake_mode
from ditfastattn.passes.graph.ir import aten, value

_INDICES = 3  # the place in a block mask of the blocks that each block of queries attends
_OF_NO_PAIR = (aten.new_ones.default, aten.ones.default, aten.full.default, aten.new_full.default)


def tensors_of(module: GraphModule, node: Node) -> list[Node]:
    """Return the inputs of a FlexAttention that are tensors; others are its functions."""
    return [item for item in node.all_input_nodes if _function(module, item) is None]


def expanded_flex(module: GraphModule, node: Node) -> GraphModule:
    """Return what the FlexAttention ``node`` computes, as a graph of ``tensors_of`` it.

    Raises:
        ConfigError: its mask is given by blocks alone, which no function of a pair tells.
    """
    functions: dict[Node, Any] = {
        item: function
        for item in node.all_input_nodes
        if (function := _function(module, item)) is not None
    }
    block_mask: Any = node.args[4]
    if value(block_mask[_INDICES]).numel() > 1 and _hides_nothing(functions[block_mask[-1]]):
        raise ConfigError(
            "a FlexAttention whose mask is a list of blocks has no ONNX form",
            where=str(node.meta.get("stack_trace", node.name)).strip(),
            expected="a mask_mod that says which keys a query attends",
            remedy="run the plan in torch, by accelerate(pipeline, plan)",
        )
    sources = tensors_of(module, node)

    def call(*tensors: Any) -> Any:
        given = functions | dict(zip(sources, tensors, strict=True))
        args: Any = map_arg(node.args, given.__getitem__)
        kwargs: Any = map_arg(node.kwargs, given.__getitem__)
        return math_attention(*args, **kwargs)

    with fake_mode(module.graph), torch.no_grad():
        trace = make_fx(call)(*(torch.empty_like(value(source)) for source in sources))
    trace.graph.eliminate_dead_code()
    return trace


def _function(module: GraphModule, node: Node) -> GraphModule | None:
    found = getattr(module, str(node.target), None) if node.op == "get_attr" else None
    return found if isinstance(found, GraphModule) else None


def _hides_nothing(mask: GraphModule) -> bool:
    made = [node.target for node in mask.graph.nodes if node.op == "call_function"]
    return all(target in _OF_NO_PAIR for target in made)
