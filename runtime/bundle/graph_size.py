"""Measure a graph before a runtime reads it: what it will ask of the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ditfastattn.runtime.bundle.specs import ITEM_BYTES, GraphSize, Multiple, TensorSpec


def measure(model: Any, inputs: Sequence[TensorSpec]) -> GraphSize:
    """Return the size of an ONNX ``model``, at the least batch that its ``inputs`` can have."""
    import onnx

    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    batch = math.lcm(*(s.denominator for i in inputs for s in i.shape if isinstance(s, Multiple)))
    sizes = {spec.name: spec.sizes(batch) for spec in inputs}
    for value in sized.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, sizes[value.name], strict=True):
            dim.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(sized, data_prop=True)
    known = {value.name: _bytes(value) for value in inferred.graph.value_info}
    outputs = {value.name for value in model.graph.output}
    made = [known.get(name, -1) for node in model.graph.node for name in node.output if name]
    named = sum(name in outputs for node in model.graph.node for name in node.output)
    return GraphSize(
        nodes=len(model.graph.node),
        largest=max(0, *made),
        unknown=sum(size < 0 for size in made) - named,
    )


def _bytes(value: Any) -> int:
    """Return how many bytes a value takes, or -1 where that is unknown."""
    tensor = value.type.tensor_type
    dims = tensor.shape.dim
    known = tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
    if not known or tensor.elem_type not in ITEM_BYTES:
        return -1
    return ITEM_BYTES[tensor.elem_type] * math.prod(int(dim.dim_value) for dim in dims)
