"""Decompose operators that have no export rule into operators that have one, by torch's rules."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.expand_flex import expanded_flex, tensors_of
from ditfastattn.passes.graph.fake_values import fake_mode
from ditfastattn.passes.graph.ir import FLEX_ATTENTION, calls


def decompose_unknown(
    module: GraphModule, known: Collection[Any], static: Collection[int] = ()
) -> int:
    """Replace in place each call of an operator that is not ``known``; return how many there were.

    What depends on the inputs at the positions ``static`` alone is computed at export, and may use
    any operator.

    Raises:
        ConfigError: an operator without a rule remains.
    """
    for flex in calls(module.graph, FLEX_ATTENTION):
        _paste(module, flex, expanded_flex(module, flex), tensors_of(module, flex))
        module.graph.eliminate_dead_code()  # its functions
    unknown = _unknown(module, known, static)
    for node in unknown:
        if isinstance(node.target, torch._ops.OpOverload):  # not of functions
            _paste(module, node, _decomposed(module, node), node.all_input_nodes)
    remaining = _unknown(module, known, static)
    if remaining:
        raise ConfigError(
            "operators that have no ONNX form",
            where=str(remaining[0].meta.get("stack_trace", remaining[0].name)).strip(),
            got=", ".join(sorted({str(node.target) for node in remaining})),
            remedy="write the model without them, or add a rule in export/operators",
        )
    module.recompile()
    return len(unknown)


def _unknown(module: GraphModule, known: Collection[Any], static: Collection[int]) -> list[Node]:
    placeholders = module.graph.find_nodes(op="placeholder")
    depends = {node for index, node in enumerate(placeholders) if index not in static}
    found: list[Node] = []
    for node in module.graph.nodes:
        if not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
            named = node.op == "call_function" and node.target is not operator.getitem
            found += [node] if named and node.target not in known else []
    return found


def _decomposed(module: GraphModule, node: Node) -> GraphModule:
    sources = node.all_input_nodes

    def call(*tensors: Any) -> Any:
        given = dict(zip(sources, tensors, strict=True))
        args = map_arg(node.args, given.__getitem__)
        kwargs = map_arg(node.kwargs, given.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # an operator

    with fake_mode(module.graph), torch.no_grad():
        examples = [torch.empty_like(source.meta["val"]) for source in sources]
        rules: dict[Any, Any] = dict(core_aten_decompositions())
        made = make_fx(call, decomposition_table=rules)(*examples)
        if any(map(_writes, made.graph.nodes)):  # to a tensor of its own
            made = make_fx(torch.func.functionalize(made))(*examples)
    return made


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _paste(module: GraphModule, node: Node, trace: GraphModule, given: Sequence[Node]) -> None:
    returned = copy_trace(module, node, trace, given)
    if isinstance(returned, Node):
        node.replace_all_uses_with(returned)
    else:  # several results, each taken by its number
        for user in list(node.users):
            user.replace_all_uses_with(returned[user.args[1]])
            module.graph.erase_node(user)
    module.graph.erase_node(node)


def copy_trace(module: GraphModule, node: Node, trace: GraphModule, given: Sequence[Node]) -> Any:
    """Copy the nodes of ``trace`` before ``node``, for the inputs ``given``; return its results."""
    inputs = trace.graph.find_nodes(op="placeholder")
    copies: dict[Node, Node] = dict(zip(inputs, given, strict=True))
    with module.graph.inserting_before(node):
        for inner in trace.graph.nodes:
            if inner.op == "get_attr":
                name = f"{node.name}_{inner.target}"
                module.register_buffer(name, getattr(trace, str(inner.target)), persistent=False)
                copies[inner] = module.graph.get_attr(name)
                copies[inner].meta["val"] = inner.meta["val"]
            elif inner.op == "call_function":
                copies[inner] = module.graph.node_copy(inner, copies.__getitem__)
                copies[inner].meta["stack_trace"] = node.meta.get("stack_trace", "")
    return map_arg(trace.graph.output_node().args[0], copies.__getitem__)
