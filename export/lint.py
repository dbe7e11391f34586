"""Check an exported graph for what runtimes refuse, silently drop, or run slowly.

Each rule is a trap that was observed; ARCHITECTURE.md lists which runtime does what.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, defs, numpy_helper

from ditfastattn.core.errors import VerifyError

_SEQUENCES: Final = ("SplitToSequence", "SequenceAt", "SequenceConstruct", "ConcatFromSequence")
_HALF: Final = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_NEWEST_OPSET: Final = 20

Rule = Callable[[ModelProto, dict[str, int]], Iterator[str]]


def lint(path: Path) -> None:
    """Raise ``VerifyError`` if the graph in ``path`` has a known trap, or is not valid ONNX."""
    found = findings(path)
    if found:
        raise VerifyError(f"{path}: the exported graph is not sound:\n  " + "\n  ".join(found))


def findings(path: Path) -> list[str]:
    """Return what is wrong with the graph in ``path``, one line each."""
    model = onnx.load(str(path), load_external_data=False)
    types, found = _types(model.graph), list[str]()
    try:
        onnx.checker.check_model(str(path))  # a path: it looks for the weights beside it
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        types |= _types(inferred.graph)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        found.append(f"not valid ONNX: {error}")
    return found + [line for rule in RULES for line in rule(model, types)]


def _types(graph: GraphProto) -> dict[str, int]:
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def nodes_of(graph: GraphProto) -> Iterator[NodeProto]:
    """Return the nodes of a graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from nodes_of(inner)


def _opset(model: ModelProto, types: dict[str, int]) -> Iterator[str]:
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            yield f"operators of {entry.domain!r}: only one runtime has them"
        elif entry.version > _NEWEST_OPSET:
            yield f"opset {entry.version}: TensorRT reads up to {_NEWEST_OPSET} without loss"


def _unknown(model: ModelProto, types: dict[str, int]) -> Iterator[str]:
    for node in nodes_of(model.graph):
        if not defs.has(node.op_type, _NEWEST_OPSET, node.domain):
            yield f"{node.name}: {node.op_type} is not an operator of opset {_NEWEST_OPSET}"


def _constant(model: ModelProto, types: dict[str, int]) -> Iterator[str]:
    reached = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if reached.isdisjoint(node.input):
            yield f"{node.name}: {node.op_type} depends on no input: loading refuses such nodes"
        reached.update(node.output)


def _attention(model: ModelProto, types: dict[str, int]) -> Iterator[str]:
    for node in nodes_of(model.graph):
        if node.op_type == "Attention":
            yield (
                f"{node.name}: Attention: TensorRT silently drops its window, and fails if two "
                "share keys or one is inside an If; write MatMul, Softmax, MatMul"
            )


def _sequences(model: ModelProto, types: dict[str, int]) -> Iterator[str]:
    for node in nodes_of(model.graph):
        if node.op_type in _SEQUENCES:
            yield f"{node.name}: {node.op_type}: TensorRT has no sequences; write Split"


def _bf16(model: ModelProto, types: dict[str, int]) -> Iterator[str]:
    for node in nodes_of(model.graph):
        given = [types.get(name, 0) == TensorProto.BFLOAT16 for name in node.input]
        if any(given) and defs.has(node.op_type, _NEWEST_OPSET, node.domain):
            schema = defs.get_schema(node.op_type, _NEWEST_OPSET, node.domain)
            inputs = [*schema.inputs, *[schema.inputs[-1]] * len(given)]  # the last may repeat
            if any(
                there and "tensor(bfloat16)" not in formal.types
                for there, formal in zip(given, inputs, strict=False)
            ):
                yield f"{node.name}: {node.op_type} does not take bfloat16 in opset {_NEWEST_OPSET}"


def _infinities(model: ModelProto, types: dict[str, int]) -> Iterator[str]:
    """Find additive masks with true infinities, which fp16 softmax turns into NaN."""
    for tensor in model.graph.initializer:
        external = tensor.data_location == TensorProto.EXTERNAL
        if tensor.data_type == TensorProto.FLOAT16 and not external:
            content = numpy_helper.to_array(tensor)
            if content.size and bool((content == float("-inf")).any()):
                yield f"{tensor.name}: minus infinity in fp16; write -6e4"


def _widened_scores(model: ModelProto, types: dict[str, int]) -> Iterator[str]:
    """Find scores computed in fp32 from half precision: TensorRT does not fuse that attention.

    A model in fp32 may round its queries and keys to half precision; its values are in fp32. Or it
    may compute an attention in bf16, for which ONNX Runtime has no kernels.
    """
    in_bf16 = any(item.data_type == TensorProto.BFLOAT16 for item in model.graph.initializer)
    half = _HALF if in_bf16 else (TensorProto.FLOAT16,)
    makers = {name: node for node in model.graph.node for name in node.output}
    wide = {
        node.input[0]
        for node in model.graph.node
        if node.op_type == "MatMul"
        and types.get(node.input[1]) == TensorProto.FLOAT
        and not _was_half(node.input[1], makers, types, half)
    }
    for node in model.graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "Softmax" else None
        while maker is not None and maker.op_type in ("Add", "Mul", "Div", "Where"):
            maker = makers.get(maker.input[0])
        if maker is None or maker.op_type != "MatMul" or node.output[0] in wide:
            continue
        for name in maker.input:
            if _was_half(name, makers, types, half):
                yield f"{maker.name}: scores of half precision in fp32: TensorRT does not fuse them"


def _was_half(
    name: str, makers: Mapping[str, NodeProto], types: Mapping[str, int], half: Collection[int]
) -> bool:
    """Return whether the value called ``name`` is cast from one in a dtype of ``half``."""
    cast = makers.get(name)
    while cast is not None and cast.op_type in ("Mul", "Transpose", "Reshape", "Gather"):
        cast = makers.get(cast.input[0])
    return cast is not None and cast.op_type == "Cast" and types.get(cast.input[0]) in half


RULES: Final[tuple[Rule, ...]] = (
    _opset,
    _unknown,
    _constant,
    _attention,
    _sequences,
    _bf16,
    _infinities,
    _widened_scores,
)
