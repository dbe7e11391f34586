"""Keep a product whole whose result is split, so that all variants share its weights.

A builder splits the product itself instead, and merges the pieces in an order that differs between
the branches of a switch: it would hold the weights once per order. It does not split a product from
which parts are gathered.

Before::

    %3 = MatMul(%0, %weight)                      float16[4, 256, 3072]
    %4 = Add(%3, %bias)
    %5, %6, %7 = Split(%4, [1024, 1024, 1024], axis=-1)

After::

    %8 = Reshape(%4, [0, 0, 3, 1024])
    %5 = Gather(%8, 0, axis=2)
    %6 = Gather(%8, 1, axis=2)
    %7 = Gather(%8, 2, axis=2)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

_PRODUCTS = ("MatMul", "Gemm")


def keep_products_whole(model: ModelProto) -> int:
    """Gather the equal parts of products instead of splitting them; return how many changed."""
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    sizes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in (*inferred.value_info, *inferred.output)
    }
    producers = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    changed = 0
    for node in graph.node:
        parts = [sizes.get(name, []) for name in node.output]
        equal = node.op_type == "Split" and _splits_alike(node, parts)
        if equal and _splits_product(node, producers, weights):
            nodes += _gathered(graph, node, parts[0])
            changed += 1
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def _splits_alike(node: NodeProto, parts: Sequence[list[int]]) -> bool:
    """Return whether ``node`` splits the last axis into parts of one known size."""
    rank = len(parts[0])
    (axis,) = [item.i for item in node.attribute if item.name == "axis"] or [0]
    alike = all(part == parts[0] for part in parts)
    return rank > 0 and axis in (-1, rank - 1) and alike and parts[0][-1] > 0


def _splits_product(node: NodeProto, producers: dict[str, NodeProto], weights: set[str]) -> bool:
    """Return whether ``node`` splits a product with weights, plus an optional bias."""
    found = producers.get(node.input[0])
    if found is not None and found.op_type == "Add":
        found = next((producers[name] for name in found.input if name in producers), None)
    return (
        found is not None
        and found.op_type in _PRODUCTS
        and any(name in weights for name in found.input)
    )


def _gathered(graph: GraphProto, node: NodeProto, part: list[int]) -> list[NodeProto]:
    """Return nodes that gather the outputs of ``node``, each of the shape ``part``."""
    apart = f"{node.output[0]}.apart"
    shape = [*(0 for _ in part[:-1]), len(node.output), part[-1]]
    nodes = [helper.make_node("Reshape", [node.input[0], f"{apart}.shape"], [apart], apart)]
    graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), f"{apart}.shape"))
    for number, output in enumerate(node.output):
        place = f"{output}.place"
        graph.initializer.append(numpy_helper.from_array(np.array(number, np.int64), place))
        picked = helper.make_node("Gather", [apart, place], [output], output, axis=len(part) - 1)
        nodes.append(picked)
    return nodes
