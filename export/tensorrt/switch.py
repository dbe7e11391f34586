"""Join the graphs of all step variants in one that takes the variant's number: the weights once.

TensorRT's engines share no weights, but the branches of an ``If`` share those of the graph around
them. Branches must return the same outputs, while variants read and write different cache slots:
slots go through *ports*, inputs and outputs of a shape, that each variant uses for its own.

What is computed per image and not per token (the conditioning of all blocks) is moved in front of
the branches: builders merge such products, each branch other ones, and would hold merged copies of
their weights.

The batch is fixed: TensorRT-RTX 1.7 fails on a free one inside an ``If``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ditfastattn.export.tensorrt.keep_whole import keep_products_whole
from ditfastattn.runtime.bundle.manifest import Manifest, TensorSpec
from ditfastattn.runtime.tensorrt.engines import PortSpec, SwitchSpec, SwitchVariant

SWITCH_FILE: Final = "switch.onnx"
VARIANT: Final = "variant"


_Key = tuple[Any, ...]


@dataclass(frozen=True)
class Switch:
    """Hold the graph, and how variants use it."""

    model: ModelProto
    spec: SwitchSpec


def make_switch(root: Path, manifest: Manifest, rows: int) -> Switch:
    """Return one graph of all variants of the bundle in ``root``, for calls of ``rows`` rows.

    Its weights are the bundle's.
    """
    models = [
        onnx.load(str(root / variant.file), load_external_data=False)
        for variant in manifest.variants
    ]
    for model in models:
        _fix(model.graph, manifest, rows)
        keep_products_whole(model)
    return _Joiner(manifest, models, rows).join()


@dataclass
class _Ports:
    """Hand out ports by shape and dtype: as many of each as the variant that needs most."""

    prefix: str
    infos: list[ValueInfoProto] = field(default_factory=list)
    specs: list[PortSpec] = field(default_factory=list)
    _like: dict[bytes, list[int]] = field(default_factory=dict)

    def take(self, infos: Sequence[ValueInfoProto], specs: Sequence[TensorSpec]) -> tuple[int, ...]:
        """Return a port of its own for each value of one variant."""
        taken: dict[bytes, int] = {}
        return tuple(self._next(info, spec, taken) for info, spec in zip(infos, specs, strict=True))

    def _next(self, info: ValueInfoProto, spec: TensorSpec, taken: dict[bytes, int]) -> int:
        key = info.type.SerializeToString(deterministic=True)
        like = self._like.setdefault(key, [])
        rank = taken.get(key, 0)
        taken[key] = rank + 1
        if rank == len(like):
            like.append(len(self.infos))
            made = ValueInfoProto()
            made.CopyFrom(info)
            made.name = f"{self.prefix}.{len(self.infos)}"
            self.infos.append(made)
            self.specs.append(PortSpec(name=made.name, like=spec))
        return like[rank]


class _Initializers:
    """Hold the weights and constants of all variants, each content once."""

    def __init__(self) -> None:
        self.all: dict[str, TensorProto] = {}
        self._names: dict[Any, str] = {}

    def add(self, tensor: TensorProto) -> str:
        """Return the name under which ``tensor`` is held."""
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


class _Joiner:
    def __init__(self, manifest: Manifest, models: Sequence[ModelProto], rows: int) -> None:
        self._manifest, self._models, self._rows = manifest, models, rows
        self._initializers = _Initializers()
        self._reads, self._writes = _Ports("read"), _Ports("write")
        self._shared: dict[_Key, str] = {}  # what is computed in front of the branches
        self._front: list[NodeProto] = []

    def join(self) -> Switch:
        used = [self._used(index) for index in range(len(self._models))]
        keys = [self._per_image(model) for model in self._models]
        often = Counter(key for each in keys for key in set(each.values()))
        first = self._models[0].graph
        outputs = [info for info in first.output if info.name in self._outputs]
        branches = [
            self._branch(index, variant, outputs, {n: k for n, k in each.items() if often[k] > 1})
            for index, (variant, each) in enumerate(zip(used, keys, strict=True))
        ]
        chosen = self._choose(branches, 0)
        inputs = self._inputs()
        names = [*(info.name for info in outputs), *(info.name for info in self._writes.infos)]
        nodes = [*self._front, *chosen.node]
        nodes += [
            helper.make_node("Identity", [inner.name], [name], name)
            for inner, name in zip(chosen.output, names, strict=True)
        ]
        number = helper.make_tensor_value_info(VARIANT, TensorProto.INT32, [])
        graph = helper.make_graph(
            nodes,
            "switch",
            [number, *inputs, *self._reads.infos],
            [*outputs, *self._writes.infos],
            list(self._initializers.all.values()),
        )
        made = helper.make_model(
            graph,
            producer_name=self._models[0].producer_name,
            ir_version=self._models[0].ir_version,
            opset_imports=list(self._models[0].opset_import),
        )
        spec = SwitchSpec(
            variant=VARIANT,
            inputs=tuple(info.name for info in inputs),
            reads=tuple(self._reads.specs),
            writes=tuple(self._writes.specs),
            variants=tuple(used),
        )
        return Switch(made, spec)

    @property
    def _outputs(self) -> set[str]:
        return {spec.name for spec in self._manifest.outputs}

    def _used(self, index: int) -> SwitchVariant:
        """Return the ports of one variant, made where they are lacking."""
        variant, graph = self._manifest.variants[index], self._models[index].graph
        slots = {slot.name: slot for slot in self._manifest.slots}
        given = {info.name: info for info in graph.input}
        made = {info.name: info for info in graph.output}
        reads = [given[name] for _, name in variant.reads]
        # A slot that is no cache is a number: how far a step extrapolates.
        read = [
            slots.get(slot) or TensorSpec(name=slot, shape=(), dtype="float32")
            for slot, _ in variant.reads
        ]
        writes = [made[name] for _, name in variant.writes]
        written = [slots[slot] for slot, _ in variant.writes]
        return SwitchVariant(
            reads=self._reads.take(reads, read), writes=self._writes.take(writes, written)
        )

    def _inputs(self) -> list[ValueInfoProto]:
        """Return the model's inputs that some variant uses, in the model's order."""
        used = {name for variant in self._manifest.variants for name in variant.inputs}
        infos = {info.name: info for model in self._models for info in model.graph.input}
        return [infos[spec.name] for spec in self._manifest.inputs if spec.name in used]

    def _per_image(self, model: ModelProto) -> dict[str, _Key]:
        """Return keys of the values that are a vector per image, and depend on such alone.

        Values of equal keys are equal, whatever the variant.
        """
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        inputs = {spec.name for spec in self._manifest.inputs}
        keys: dict[str, _Key] = {"": ()}
        keys |= {info.name: (info.name,) for info in graph.input if info.name in inputs}
        keys |= {t.name: (self._initializers.add(t),) for t in graph.initializer}
        sizes = {info.name: _sizes(info) for info in graph.value_info}
        found: dict[str, _Key] = {}
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
        return sizes is not None and (
            len(sizes) < 2 or (len(sizes) == 2 and sizes[0] <= self._rows)
        )

    def _move(self, node: NodeProto, names: dict[str, str], keys: Mapping[str, _Key]) -> None:
        """Compute ``node`` in front of the branches, unless that is done there already."""
        if keys[node.output[0]] not in self._shared:
            prefix = f"shared_{len(self._front)}/"
            self._front.append(_renamed(node, names, prefix))
            self._shared |= {keys[name]: names[name] for name in node.output}
        names.update({name: self._shared[keys[name]] for name in node.output})

    def _branch(
        self,
        index: int,
        used: SwitchVariant,
        outputs: Sequence[ValueInfoProto],
        shared: Mapping[str, _Key],
    ) -> GraphProto:
        """Return one variant as a branch: the model's outputs, then all ports."""
        variant, graph = self._manifest.variants[index], self._models[index].graph
        prefix = f"variant_{index}/"
        names = {name: name for name in variant.inputs}
        for port, (_, name) in zip(used.reads, variant.reads, strict=True):
            names[name] = self._reads.infos[port].name
        for tensor in graph.initializer:
            names[tensor.name] = self._initializers.add(tensor)
        nodes: list[NodeProto] = []
        for node in graph.node:
            if node.output[0] in shared:
                self._move(node, names, shared)
            else:
                nodes.append(_renamed(node, names, prefix))
        written = {
            port: names[name] for port, (_, name) in zip(used.writes, variant.writes, strict=True)
        }
        results: list[ValueInfoProto] = []
        for info in outputs:
            results.append(_output(nodes, info, names[info.name], prefix))
        for port, info in enumerate(self._writes.infos):
            name = written.get(port) or self._zeros(nodes, port, prefix)
            results.append(_output(nodes, info, name, prefix))
        return helper.make_graph(nodes, f"variant_{index}", [], results)

    def _zeros(self, nodes: list[NodeProto], port: int, prefix: str) -> str:
        """Add nodes that fill a port of which the variant makes no use; return their result."""
        spec, info = self._writes.specs[port], self._writes.infos[port]
        kind = info.type.tensor_type.elem_type
        zero = self._constant(helper.make_tensor("zero", kind, [], bytes(_SIZES[kind]), raw=True))
        sizes = spec.like.sizes(self._rows)
        content = b"".join(size.to_bytes(8, "little") for size in sizes)
        shape = helper.make_tensor("sizes", TensorProto.INT64, [len(sizes)], content, raw=True)
        name = f"{prefix}{info.name}.unused"
        nodes.append(helper.make_node("Expand", [zero, self._constant(shape)], [name], name))
        return name

    def _constant(self, tensor: TensorProto) -> str:
        return self._initializers.add(tensor)

    def _choose(self, branches: Sequence[GraphProto], first: int) -> GraphProto:
        """Return a graph that runs the branch asked for, by halves; ``first`` counts from."""
        if len(branches) == 1:
            return branches[0]
        half = len(branches) // 2
        name = f"variants_{first}_to_{first + len(branches) - 1}"
        bound = helper.make_tensor(
            "bound", TensorProto.INT32, [], (first + half).to_bytes(4, "little"), raw=True
        )
        # A branch's outputs are named after the graph that they are in, and a slash.
        outputs = [f"{name}/{output.name.partition('/')[2]}" for output in branches[0].output]
        condition = f"{name}/left"
        nodes = [
            helper.make_node("Less", [VARIANT, self._constant(bound)], [condition], condition),
            helper.make_node(
                "If",
                [condition],
                outputs,
                name,
                then_branch=self._choose(branches[:half], first),
                else_branch=self._choose(branches[half:], first + half),
            ),
        ]
        made = helper.make_graph(nodes, name, [], branches[0].output)
        for output, label in zip(made.output, outputs, strict=True):
            output.name = label
        return made


_SIZES: Final[dict[int, int]] = {
    TensorProto.FLOAT: 4,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
    TensorProto.DOUBLE: 8,
}


def _sizes(info: ValueInfoProto) -> tuple[int, ...] | None:
    """Return a shape; None where a size is not known."""
    kind = info.type.tensor_type
    known = kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim)
    return tuple(dim.dim_value for dim in kind.shape.dim) if known else None


def _fix(graph: GraphProto, manifest: Manifest, rows: int) -> None:
    """Put numbers in the place of the batch, in the shapes of a graph's inputs and outputs."""
    specs: dict[str, TensorSpec] = {slot.name: slot for slot in manifest.slots}
    specs |= {spec.name: spec for spec in (*manifest.inputs, *manifest.outputs)}
    names = {made: slot for variant in manifest.variants for slot, made in variant.writes}
    for info in (*graph.input, *graph.output):
        spec = specs.get(names.get(info.name, info.name))
        sizes = () if spec is None else spec.sizes(rows)
        for dim, size in zip(info.type.tensor_type.shape.dim, sizes, strict=True):
            dim.dim_value = size


def _renamed(node: NodeProto, names: dict[str, str], prefix: str) -> NodeProto:
    """Return a copy of ``node`` in the names of the whole; its outputs join ``names``."""
    made = NodeProto()
    made.CopyFrom(node)
    made.name = f"{prefix}{node.name or node.output[0]}"
    for name in node.output:
        names[name] = f"{prefix}{name}"
    made.input[:] = [names[name] if name else "" for name in node.input]
    made.output[:] = [names[name] for name in node.output]
    return made


def _output(nodes: list[NodeProto], like: ValueInfoProto, name: str, prefix: str) -> ValueInfoProto:
    """Let a branch return the value called ``name``; it may be an input or a weight."""
    made = ValueInfoProto()
    made.CopyFrom(like)
    made.name = f"{prefix}returned/{like.name}"
    nodes.append(helper.make_node("Identity", [name], [made.name], made.name))
    return made
