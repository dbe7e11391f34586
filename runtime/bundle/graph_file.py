"""Read a graph of a bundle, and check it before a runtime does: it may come from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.bundle.graph_size import measure
from ditfastattn.runtime.bundle.specs import ELEMENT_TYPES, ITEM_BYTES, GraphSize, TensorSpec

INSTALL: Final = 'pip install "ditfastattn[onnx]"'
_PRODUCTS: Final = ("MatMul", "Gemm")
_EXPORT_AGAIN: Final = "do not load bundles of unknown origin; export it again"


@dataclass(frozen=True)
class Weight:
    """Hold an initializer whose content lies in the weights file: a view of that, as numbers.

    ``only_multiplied``: no other operators than products of matrices read it.
    """

    name: str
    kind: int
    content: np.ndarray[Any, Any]
    only_multiplied: bool


@dataclass(frozen=True)
class GraphFile:
    """Hold a graph that was checked, and the weights that it takes from the bundle's file."""

    path: Path
    content: bytes
    weights: tuple[Weight, ...]


@dataclass(frozen=True)
class WeightsFile:
    """Hold the name of the file of weights, as graphs refer to it, and its content."""

    name: str
    content: Any  # bytes, or a mapping of them


def read_graph(
    path: Path,
    content: bytes,
    weights: WeightsFile,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    size: GraphSize,
) -> GraphFile:
    """Return the graph that ``content`` holds, which was read from ``path``.

    Raises:
        ConfigError: it is not ONNX; it has other ``inputs`` or ``outputs``, or is larger, than the
            manifest says; it refers to another file than the weights, or beyond their end; or it is
            not as an export writes it.
    """
    model = _parse(path, content)
    _check_nodes(path, model)
    _check_ports(path, model.graph, inputs, outputs)
    _check_size(path, measure(model, inputs), size)
    read_otherwise = {
        name for node in model.graph.node if node.op_type not in _PRODUCTS for name in node.input
    }
    held = [
        _weight(path, tensor, weights, tensor.name not in read_otherwise)
        for tensor in model.graph.initializer
        if not _lies_within(path, tensor)
    ]
    return GraphFile(path, content, tuple(held))


def _parse(path: Path, content: bytes) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ConfigError("onnx is not installed", got=error, remedy=INSTALL) from error
    from google.protobuf.message import DecodeError

    try:
        return onnx.load_model_from_string(content)
    except DecodeError as error:
        raise ConfigError("the graph is not ONNX", where=str(path), got=error) from error


def _check_nodes(path: Path, model: Any) -> None:
    """Refuse what no export writes.

    Such as graphs within nodes, operators of others, weights that lie elsewhere, and nodes that no
    input reaches: runtimes compute these while they load.
    """
    graph = model.graph
    reached = {value.name for value in graph.input}
    for node in graph.node:
        where = f"{path}: {node.name or node.op_type}"
        if reached.isdisjoint(node.input):
            raise ConfigError(
                "the node depends on no input of the graph",
                where=where,
                got=node.op_type,
                remedy=_EXPORT_AGAIN,
            )
        reached.update(node.output)
        if node.domain not in ("", "ai.onnx"):
            raise ConfigError(
                "the node is not an operator of ONNX",
                where=where,
                got=f"{node.domain}.{node.op_type}",
                remedy=_EXPORT_AGAIN,
            )
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise ConfigError(
                    "the node holds a graph", where=where, got=node.op_type, remedy=_EXPORT_AGAIN
                )
            if any(tensor.external_data for tensor in (attribute.t, *attribute.tensors)):
                raise ConfigError(
                    "the node refers to a file that is not the bundle's weights",
                    where=where,
                    remedy=_EXPORT_AGAIN,
                )
    for what, found in (
        ("sparse weights", graph.sparse_initializer),
        ("functions", model.functions),
        ("steps of training", model.training_info),
    ):
        if found:
            raise ConfigError(f"the graph has {what}", where=str(path), remedy=_EXPORT_AGAIN)


def _check_ports(
    path: Path, graph: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    for kind, values, specs in (
        ("inputs", graph.input, inputs),
        ("outputs", graph.output, outputs),
    ):
        found = {value.name: _described(value) for value in values}
        wanted = {spec.name: (ELEMENT_TYPES[spec.torch_dtype], spec.dims) for spec in specs}
        if found != wanted:
            name = min(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
            raise ConfigError(
                f"the {kind} of the graph differ from the manifest",
                where=f"{path}: {name}",
                got=found.get(name, "none of that name"),
                expected=wanted.get(name, "none of that name"),
                remedy="export the bundle again (`ditfastattn export`)",
            )


def _check_size(path: Path, found: GraphSize, expected: GraphSize) -> None:
    if found.nodes != expected.nodes or found.exceeds(expected):
        raise ConfigError(
            "the graph is larger or smaller than the manifest says",
            where=str(path),
            got=found,
            expected=expected,
            remedy=_EXPORT_AGAIN,
        )


def _described(value: Any) -> tuple[int, tuple[int | str, ...]]:
    """Return the element type and the dimensions of a graph's input or output."""
    tensor = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return tensor.elem_type, dims


def _lies_within(path: Path, tensor: Any) -> bool:
    """Return whether the graph itself holds an initializer's content, all of it."""
    if tensor.external_data or tensor.data_location == tensor.EXTERNAL:
        return False
    size = math.prod(tensor.dims) * ITEM_BYTES.get(tensor.data_type, -1)
    if size != len(tensor.raw_data):
        raise ConfigError(
            "the graph holds a tensor of another size than it says",
            where=f"{path}: {tensor.name}",
            got=f"{len(tensor.raw_data)} bytes",
            expected=f"{size} bytes",
            remedy=_EXPORT_AGAIN,
        )
    return True


def _weight(path: Path, tensor: Any, weights: WeightsFile, only_multiplied: bool) -> Weight:
    """Return an initializer's content, a part of the weights file."""
    where = f"{path}: {tensor.name}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if entries.get("location") != weights.name:
        raise ConfigError(
            "the graph refers to a file that is not the bundle's weights",
            where=where,
            got=entries.get("location"),
            expected=weights.name,
            remedy=_EXPORT_AGAIN,
        )
    offset, length = (_natural(entries.get(key)) for key in ("offset", "length"))
    size = math.prod(tensor.dims) * ITEM_BYTES.get(tensor.data_type, 0)
    if length != size or not 0 < size <= len(weights.content) - offset:
        raise ConfigError(
            "the graph refers to other weights than its tensor needs",
            where=where,
            got=f"{length} bytes from {offset} on",
            expected=f"{size} bytes of a file of {len(weights.content)}",
            remedy=_EXPORT_AGAIN,
        )
    bits = np.dtype(f"u{ITEM_BYTES[tensor.data_type]}")  # numpy knows no bfloat16
    content = np.frombuffer(weights.content, bits, size // bits.itemsize, offset)
    content = content.reshape(tuple(tensor.dims))
    return Weight(tensor.name, tensor.data_type, content, only_multiplied)


def _natural(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else -1
