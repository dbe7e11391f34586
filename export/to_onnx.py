"""Write one captured graph, dense or a step variant, as ONNX.

The graph is taken as the passes left it; no optimizer runs afterwards. What depends on weights and
constants alone is computed here.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.version import __version__
from ditfastattn.export.batch import FIX_BATCH, BatchSize, Symbols
from ditfastattn.export.emitter import OPSET, Emitter, Value, value_info
from ditfastattn.export.operators import RULES
from ditfastattn.export.operators.base import Call, in_fp32
from ditfastattn.passes.graph.ir import outputs

IR_VERSION = 10  # not the newest, for older runtimes
PRODUCER = "ditfastattn"


@dataclass(frozen=True)
class GraphSource:
    """Hold a graph to export.

    Attributes:
        module: the graph.
        symbols: its arguments and shapes, with the batch marked.
        static: the names and contents of its static inputs, by position.
    """

    module: GraphModule
    symbols: Symbols
    static: Mapping[int, tuple[str, Tensor]]

    @property
    def in_bfloat16(self) -> bool:
        """Tell whether the model has weights in bf16, and is for a runtime that computes in it.

        ONNX Runtime's CPU provider does not: what another model computes in bf16, such as one
        attention, is computed in fp32 and rounded, operator by operator.
        """
        return any(tensor.dtype == torch.bfloat16 for _, tensor in self.static.values())


def emit(emitter: Emitter, source: GraphSource, given: Sequence[Value]) -> list[Value]:
    """Add the nodes of a graph to ``emitter``; return what the graph returns.

    ``given`` stands for the inputs that are not static, in order.
    """
    module = source.module
    values: dict[Node, Any] = {}
    rest = iter(given)
    for position, node in enumerate(module.graph.find_nodes(op="placeholder")):
        if position in source.static:
            name, tensor = source.static[position]
            values[node] = Value(name, tuple(tensor.shape), tensor.dtype, tensor)
        else:
            values[node] = next(rest)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            held: Tensor = getattr(module, str(node.target))
            values[node] = Value(node.name, tuple(held.shape), held.dtype, held)
        elif node.op == "call_function":
            values[node] = _emit_node(emitter, node, source, values)
    returned = [item for item in outputs(module.graph) if isinstance(item, Node)]
    return [values[node] for node in returned]


def _emit_node(
    emitter: Emitter, node: Node, source: GraphSource, values: Mapping[Node, Any]
) -> Any:
    symbols = source.symbols
    args = map_arg(symbols.args[node], values.__getitem__)
    kwargs = map_arg(symbols.kwargs[node], values.__getitem__)
    if node.target is operator.getitem:
        return args[0][args[1]]
    known = _known(node, symbols, values)
    if known is not None:
        return known
    result: Any = node.meta["val"]
    dtypes = tuple(item.dtype for item in ([result] if isinstance(result, Tensor) else result))
    shape: Any = symbols.shapes[node]
    rule = RULES.get(node.target)
    if rule is None:  # static, except for the batch
        raise ConfigError(
            "the operator has no ONNX form at a free batch",
            where=str(node.meta.get("stack_trace", node.name)).strip(),
            got=node.target,
            remedy=f"{FIX_BATCH}, or add a rule in export/operators",
        )
    rule = rule if source.in_bfloat16 else in_fp32(rule)
    made = rule(emitter, Call(node.name, args, kwargs, shape, dtypes[0], dtypes))
    if isinstance(made, str):
        return Value(made, shape, dtypes[0])
    return [
        Value(name, part, item.dtype) for name, part, item in zip(made, shape, result, strict=True)
    ]


def _known(node: Node, symbols: Symbols, values: Mapping[Node, Any]) -> Any:
    """Return the value of ``node`` if it depends on weights and constants alone."""
    inputs = [values[source] for source in node.all_input_nodes]
    if any(not isinstance(item, Value) or item.tensor is None for item in inputs):
        return None
    if _mentions_batch((symbols.args[node], symbols.kwargs[node], symbols.shapes[node])):
        return None
    args = map_arg(node.args, lambda source: values[source].tensor)
    kwargs = map_arg(node.kwargs, lambda source: values[source].tensor)
    with torch.no_grad():
        result = node.target(*args, **kwargs)  # type: ignore[operator]  # an operator
    if isinstance(result, Tensor):
        return _constant(node.name, result)
    return [_constant(f"{node.name}.{index}", part) for index, part in enumerate(result)]


def _constant(name: str, tensor: Tensor) -> Value:
    return Value(name, tuple(tensor.shape), tensor.dtype, tensor)


def _mentions_batch(item: Any) -> bool:
    if isinstance(item, (tuple, list)):
        return any(map(_mentions_batch, item))
    if isinstance(item, dict):
        return any(map(_mentions_batch, item.values()))
    return isinstance(item, BatchSize)


def finish(
    emitter: Emitter,
    name: str,
    inputs: Sequence[Value],
    returned: Sequence[tuple[str, Value]],
    batch: str,
    about: Mapping[str, str],
) -> onnx.ModelProto:
    """Return the model of what ``emitter`` has collected.

    Args:
        emitter: the nodes and initializers.
        name: the graph's name.
        inputs: the graph's inputs.
        returned: the names of the graph's outputs, with their values.
        batch: the name of the batch dimension.
        about: what the graph is, for its metadata.
    """
    results: list[Value] = []
    for label, value in returned:
        emitter.nodes.append(helper.make_node("Identity", [emitter.use(value)], [label]))
        results.append(replace(value, name=label, tensor=None))
    graph = helper.make_graph(
        emitter.nodes,
        name,
        [value_info(value, batch) for value in inputs],
        [value_info(value, batch) for value in results],
        emitter.stored(),
    )
    model = helper.make_model(
        graph,
        producer_name=PRODUCER,
        producer_version=__version__,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    helper.set_model_props(model, {f"{PRODUCER}.{key}": item for key, item in about.items()})
    return model


def content_hash(path: Path) -> str:
    """Return a hash of what the graph in ``path`` computes, whatever its metadata says it is."""
    model = onnx.load(str(path), load_external_data=False)
    model.ClearField("metadata_props")
    model.ClearField("producer_version")
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
