"""Hold what the branches of a switch share: ports, initializers, nodes before the ``If``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from ditfastattn.runtime.bundle.specs import TensorSpec
from ditfastattn.runtime.tensorrt.engines import PortSpec

Key = tuple[Any, ...]  # of a value: equal keys are equal values, in whichever variant


@dataclass
class Ports:
    """Hand out ports by shape and dtype: as many of each as any one variant needs."""

    prefix: str
    infos: list[ValueInfoProto] = field(default_factory=list)
    specs: list[PortSpec] = field(default_factory=list)
    _like: dict[bytes, list[int]] = field(default_factory=dict)

    def take(self, infos: Sequence[ValueInfoProto], specs: Sequence[TensorSpec]) -> tuple[int, ...]:
        """Return a port for each value of one variant, no port twice."""
        taken: dict[bytes, int] = {}
        return tuple(self._next(info, spec, taken) for info, spec in zip(infos, specs, strict=True))

    def _next(self, info: ValueInfoProto, spec: TensorSpec, taken: dict[bytes, int]) -> int:
        key = info.type.SerializeToString(deterministic=True)
        like = self._like.setdefault(key, [])
        place = taken.get(key, 0)
        taken[key] = place + 1
        if place == len(like):
            like.append(len(self.infos))
            made = ValueInfoProto()
            made.CopyFrom(info)
            made.name = f"{self.prefix}.{len(self.infos)}"
            self.infos.append(made)
            self.specs.append(PortSpec(name=made.name, like=spec))
        return like[place]


class Initializers:
    """Hold the weights and constants of all variants, each content once."""

    def __init__(self) -> None:
        """Begin with none."""
        self.all: dict[str, TensorProto] = {}
        self._names: dict[Any, str] = {}

    def add(self, tensor: TensorProto) -> str:
        """Return the name of the initializer that has the content of ``tensor``."""
        places = tuple((entry.key, entry.value) for entry in tensor.external_data)
        key = tensor.data_type, tuple(tensor.dims), places or tensor.raw_data
        if key not in self._names:
            name, count = tensor.name, 1
            while name in self.all:
                count += 1
                name = f"{tensor.name}:{count}"
            held = TensorProto()
            held.CopyFrom(tensor)
            held.name = name
            self.all[name], self._names[key] = held, name
        return self._names[key]


class SharedNodes:
    """Hold the nodes that several variants compute alike per image, moved before the branches."""

    def __init__(self, inputs: Sequence[str], rows: int, initializers: Initializers) -> None:
        """Begin without nodes; ``inputs`` are the model's, ``rows`` those of a call."""
        self.nodes: list[NodeProto] = []
        self._inputs, self._rows, self._initializers = frozenset(inputs), rows, initializers
        self._names: dict[Key, str] = {}

    def keys(self, model: ModelProto) -> dict[str, Key]:
        """Return keys of the values that are a vector per image and depend on such alone."""
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        keys: dict[str, Key] = {"": ()}
        keys |= {info.name: (info.name,) for info in graph.input if info.name in self._inputs}
        keys |= {t.name: (self._initializers.add(t),) for t in graph.initializer}
        sizes = {info.name: _sizes(info) for info in graph.value_info}
        found: dict[str, Key] = {}
        for node in graph.node:
            small = all(self._is_small(sizes.get(name)) for name in node.output)
            if not small or any(name not in keys for name in node.input):
                continue
            given = tuple(keys[name] for name in node.input)
            named = sorted(item.SerializeToString(deterministic=True) for item in node.attribute)
            for place, name in enumerate(node.output):
                found[name] = keys[name] = (node.op_type, tuple(named), given, place)
        return found

    def _is_small(self, sizes: tuple[int, ...] | None) -> bool:
        if sizes is None:
            return False
        return len(sizes) < 2 or (len(sizes) == 2 and sizes[0] <= self._rows)

    def move(self, node: NodeProto, names: dict[str, str], keys: Mapping[str, Key]) -> None:
        """Compute ``node`` before the branches, unless an equal one is there; extend ``names``."""
        if keys[node.output[0]] not in self._names:
            self.nodes.append(renamed(node, names, f"shared_{len(self.nodes)}/"))
            self._names |= {keys[name]: names[name] for name in node.output}
        names.update({name: self._names[keys[name]] for name in node.output})


def _sizes(info: ValueInfoProto) -> tuple[int, ...] | None:
    """Return a shape, or None if a size is unknown."""
    kind = info.type.tensor_type
    known = kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim)
    return tuple(dim.dim_value for dim in kind.shape.dim) if known else None


def renamed(node: NodeProto, names: dict[str, str], prefix: str) -> NodeProto:
    """Return a copy of ``node`` in the names of the joined graph; its outputs join ``names``."""
    made = NodeProto()
    made.CopyFrom(node)
    made.name = f"{prefix}{node.name or node.output[0]}"
    for name in node.output:
        names[name] = f"{prefix}{name}"
    made.input[:] = [names[name] if name else "" for name in node.input]
    made.output[:] = [names[name] for name in node.output]
    return made
