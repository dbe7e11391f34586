"""Build an ONNX graph node by node: names, constants, weights, shapes that depend on the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from ditfastattn.export.batch import BatchSize, Shape, Size
from ditfastattn.export.fold import folded
from ditfastattn.export.weights import INLINE_BYTES, Weights, inline_tensor, onnx_type, raw_bytes
from ditfastattn.runtime.bundle.specs import Multiple

OPSET: Final = 20


@dataclass(frozen=True)
class Value:
    """Describe a value of the graph; ``tensor`` is its content, if known at export.

    ``pairs`` marks an input whose last dimension holds the parts of complex numbers.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    tensor: Tensor | None = None
    pairs: bool = False

    @property
    def rank(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)


@dataclass
class Emitter:
    """Collect nodes and initializers; ``prefix`` keeps the names of repeated graphs apart.

    ``batch`` names a value whose first dimension is the batch, if that is free.
    """

    weights: Weights
    prefix: str = ""
    batch: str = ""
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, Tensor] = field(default_factory=dict)
    _initialized: dict[Any, str] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)
    _computed: dict[Any, list[str]] = field(default_factory=dict)  # what each node computes
    _names: dict[str, int] = field(default_factory=dict)

    def unique(self, base: str) -> str:
        """Return a name that no other value has."""
        name = f"{self.prefix}{base}"
        self._names[name] = self._names.get(name, 0) + 1
        return name if self._names[name] == 1 else f"{name}:{self._names[name]}"

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one output; return its name. An empty input is omitted."""
        return self.split(kind, *inputs, count=1, name=name, **attributes)[0]

    def split(
        self, kind: str, *inputs: str, count: int, name: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with ``count`` outputs, unless an equal one is there; return their names.

        A node of constants is computed.
        """
        key = helper.make_node(kind, inputs, [], **attributes).SerializeToString(), count
        if key not in self._computed:
            self._computed[key] = self._added(kind, inputs, count, name or kind, attributes)
        return list(self._computed[key])

    def _added(
        self, kind: str, inputs: Sequence[str], count: int, base: str, attributes: dict[str, Any]
    ) -> list[str]:
        outputs = [self.unique(base) for _ in range(count)]
        node = helper.make_node(kind, inputs, outputs, outputs[0], **attributes)
        given = {item: self.initializers.get(item) for item in inputs if item}
        known = {item: tensor for item, tensor in given.items() if tensor is not None}
        if known and len(known) == len(given):
            made = zip(outputs, folded(node, known, OPSET), strict=True)
            return [self.initializer(output, tensor) for output, tensor in made]
        self.nodes.append(node)
        return outputs

    def use(self, value: Value) -> str:
        """Return the name of ``value``; known content becomes an initializer on first use."""
        if value.tensor is None:
            return value.name
        return self.initializer(value.name, value.tensor)

    def initializer(self, name: str, tensor: Tensor) -> str:
        """Return the name of an initializer with this content: ``name``, unless one exists."""
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if memory not in self._initialized:
            self._kept.append(tensor)  # keep its memory from being reused
            data = hashlib.sha256(raw_bytes(tensor)).digest()
            content = (data, tensor.shape, tensor.dtype)
            if content not in self._initialized:
                free = name
                while free in self.initializers:
                    free = self.unique(name)
                self.initializers[free] = tensor
                self._initialized[content] = free
            self._initialized[memory] = self._initialized[content]
        return self._initialized[memory]

    def stored(self) -> list[TensorProto]:
        """Return the initializers that nodes read: others were folded into those.

        ONNX Runtime refuses weights that no node reads.
        """
        read = {name for node in self.nodes for name in node.input}
        return [
            inline_tensor(name, tensor)
            if tensor.nbytes < INLINE_BYTES
            else self.weights.store(name, tensor)
            for name, tensor in self.initializers.items()
            if name in read
        ]

    def constant(self, tensor: Tensor) -> str:
        """Return the name of a constant that is not a weight."""
        return self.initializer("constant", tensor)

    def scalar(self, number: float | bool, dtype: torch.dtype) -> str:
        """Return a constant without dimensions."""
        return self.constant(torch.tensor(number, dtype=dtype))

    def ints(self, numbers: Sequence[int]) -> str:
        """Return a constant vector of int64."""
        return self.constant(torch.tensor(list(numbers), dtype=torch.int64))

    def size(self, size: Size) -> str:
        """Return one size as a vector ``[1]`` of int64."""
        if isinstance(size, int):
            return self.ints([size])
        found = self.op("Shape", self.batch, start=0, end=1, name="batch")
        if size.factor.numerator != 1:
            found = self.op("Mul", found, self.ints([size.factor.numerator]))
        if size.factor.denominator != 1:
            found = self.op("Div", found, self.ints([size.factor.denominator]))
        return found

    def sizes(self, shape: Shape) -> str:
        """Return a shape as a vector of int64."""
        if all(isinstance(size, int) for size in shape):
            return self.ints([int(size) for size in shape if isinstance(size, int)])
        return self.op("Concat", *(self.size(size) for size in shape), axis=0, name="sizes")

    def target_shape(self, shape: Shape) -> str:
        """Return a shape for ``Reshape``, which can infer one size."""
        free = [size for size in shape if not isinstance(size, int)]
        if len(free) == 1:
            return self.ints([size if isinstance(size, int) else -1 for size in shape])
        return self.sizes(shape)

    def reshape(self, name: str, shape: Shape) -> str:
        """Reshape the value called ``name``."""
        return self.op("Reshape", name, self.target_shape(shape))

    def halves(self, name: str, axis: int) -> list[str]:
        """Return the two halves of the value called ``name``."""
        return self.split("Split", name, count=2, axis=axis, num_outputs=2)

    def cast(self, name: str, dtype: torch.dtype) -> str:
        """Convert the value called ``name``."""
        return self.op("Cast", name, to=onnx_type(dtype))


def value_info(value: Value, batch: str) -> onnx.ValueInfoProto:
    """Describe a graph input or output; sizes that depend on the batch are named after it."""
    dims = [size if isinstance(size, int) else _dim_name(size, batch) for size in value.shape]
    return helper.make_tensor_value_info(value.name, onnx_type(value.dtype), dims)


def _dim_name(size: BatchSize, batch: str) -> str:
    factor = size.factor
    return Multiple(numerator=factor.numerator, denominator=factor.denominator).name(batch)
