"""Join the graphs of all step variants in one, which takes the variant's number.

TensorRT's engines do not share weights, but the branches of an ``If`` share those of the graph
around them. Branches must return the same outputs, while variants read and write different cache
slots; so slots go through *ports*, inputs and outputs of a shape that each variant uses as needed.

What is computed per image rather than per token (the conditioning of all blocks) moves before the
branches: builders merge such products, different ones in each branch, and would hold merged copies
of their weights.

The batch is fixed: TensorRT-RTX 1.7 fails on a free batch inside an ``If``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ditfastattn.export.tensorrt.keep_whole import keep_products_whole
from ditfastattn.export.tensorrt.switch_parts import Initializers, Key, Ports, SharedNodes, renamed
from ditfastattn.runtime.bundle.manifest import Manifest
from ditfastattn.runtime.bundle.specs import TensorSpec
from ditfastattn.runtime.tensorrt.engines import SwitchSpec, SwitchVariant

VARIANT: Final = "variant"


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
        _fix_batch(model.graph, manifest, rows)
        keep_products_whole(model)
    return _Joiner(manifest, models, rows).join()


class _Joiner:
    def __init__(self, manifest: Manifest, models: Sequence[ModelProto], rows: int) -> None:
        self._manifest, self._models, self._rows = manifest, models, rows
        self._initializers = Initializers()
        self._reads, self._writes = Ports("read"), Ports("write")
        names = [spec.name for spec in manifest.inputs]
        self._shared = SharedNodes(names, rows, self._initializers)

    def join(self) -> Switch:
        used = [self._used(index) for index in range(len(self._models))]
        keys = [self._shared.keys(model) for model in self._models]
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
        nodes = [*self._shared.nodes, *chosen.node]
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
        """Return the ports of one variant, adding those that are missing."""
        variant, graph = self._manifest.variants[index], self._models[index].graph
        slots = {slot.name: slot for slot in self._manifest.every_slot}
        given = {info.name: info for info in graph.input}
        made = {info.name: info for info in graph.output}
        reads = [given[name] for _, name in variant.reads]
        # A slot that is not a cache is a number: how far a step extrapolates.
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

    def _branch(
        self,
        index: int,
        used: SwitchVariant,
        outputs: Sequence[ValueInfoProto],
        shared: Mapping[str, Key],
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
                self._shared.move(node, names, shared)
            else:
                nodes.append(renamed(node, names, prefix))
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
        """Add nodes that fill a port that the variant does not use; return their result."""
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
        """Return a graph that selects one of ``branches`` by halving; they count from ``first``."""
        if len(branches) == 1:
            return branches[0]
        half = len(branches) // 2
        name = f"variants_{first}_to_{first + len(branches) - 1}"
        bound = helper.make_tensor(
            "bound", TensorProto.INT32, [], (first + half).to_bytes(4, "little"), raw=True
        )
        # The outputs of a branch are named after its graph, with a slash.
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


def _fix_batch(graph: GraphProto, manifest: Manifest, rows: int) -> None:
    """Replace the batch by numbers in the shapes of a graph's inputs and outputs."""
    specs: dict[str, TensorSpec] = {slot.name: slot for slot in manifest.every_slot}
    specs |= {spec.name: spec for spec in (*manifest.inputs, *manifest.outputs)}
    names = {made: slot for variant in manifest.variants for slot, made in variant.writes}
    for info in (*graph.input, *graph.output):
        spec = specs.get(names.get(info.name, info.name))
        sizes = () if spec is None else spec.sizes(rows)
        for dim, size in zip(info.type.tensor_type.shape.dim, sizes, strict=True):
            dim.dim_value = size


def _output(nodes: list[NodeProto], like: ValueInfoProto, name: str, prefix: str) -> ValueInfoProto:
    """Make a branch return the value called ``name``, which may be an input or a weight."""
    made = ValueInfoProto()
    made.CopyFrom(like)
    made.name = f"{prefix}returned/{like.name}"
    nodes.append(helper.make_node("Identity", [name], [made.name], made.name))
    return made
