"""Turn what Dynamo captured into one ATen-level graph of fixed shapes.

Attention, linear and normalization stay whole operators (tracing happens before dispatch), and
each node keeps the path of the module it came from. Inputs are told apart: *static* ones are the
model's parameters and buffers, *dynamic* ones are the arguments of the call.
"""

from __future__ import annotations

import re
from collections.abc import Container, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx import GraphModule, Interpreter, Node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.capture.canonicalize import canonicalize
from ditfastattn.passes.capture.functionalize import functionalize
from ditfastattn.passes.capture.recognize_attention import Unrecognized, recognize_attention

STATIC_MARK = "_dynamo_static_input_type"  # in a placeholder's meta["tensor_dict"]
_PLAIN_PATH = re.compile(r"[\w.]*")
_PEFT_WRAPPER = "base_model.model."  # a PeftModel stands around the model whose paths plans name


@dataclass(frozen=True)
class GraphInput:
    """Describe one input of a captured graph: its Python name, and whether it is static.

    A ``number`` is a Python float that Dynamo passes as a tensor, for the graph to call ``item()``.
    """

    name: str
    static: bool
    number: bool = False


@dataclass(frozen=True)
class CapturedGraph:
    """Hold a canonical ATen-level graph and its inputs, in the order of its placeholders.

    ``unrecognized`` names what computes attention in a form that no pass understands.
    """

    module: GraphModule
    inputs: tuple[GraphInput, ...]
    unrecognized: tuple[Unrecognized, ...] = ()

    @property
    def dynamic_names(self) -> tuple[str, ...]:
        """Return the names of the call's own tensors."""
        return tuple(entry.name for entry in self.inputs if not entry.static)

    def node(self, name: str) -> Node:
        """Return the placeholder of the dynamic input ``name``; ``LookupError`` if absent."""
        placeholders = self.module.graph.find_nodes(op="placeholder")
        for entry, node in zip(self.inputs, placeholders, strict=True):
            if entry.name == name and not entry.static:
                found: Node = node
                return found
        raise LookupError(name)


def describe_inputs(module: GraphModule) -> tuple[GraphInput, ...]:
    """Read names and kinds of the inputs off a graph that Dynamo made."""
    return tuple(_describe(node) for node in module.graph.find_nodes(op="placeholder"))


def _describe(node: Node) -> GraphInput:
    static = STATIC_MARK in (node.meta.get("tensor_dict") or {})
    grapharg = node.meta.get("grapharg")
    if grapharg is None:
        return GraphInput(node.name, static)
    source: Any = grapharg.source
    name: Any = source.name  # a method in older releases of torch, a property now
    path = readable_path(str(name() if callable(name) else name))
    # A decorated forward takes its arguments as L['kwargs']['timestep'].
    return GraphInput(path.removeprefix("kwargs."), static, _is_number(node))


def _is_number(node: Node) -> bool:
    uses = {(user.op, user.target) for user in node.users}
    return uses == {("call_method", "item")}


def plain_numbers(inputs: Sequence[GraphInput], args: Sequence[Any]) -> list[Any]:
    """Return ``args`` with each number that came as a tensor turned into a number again.

    Dynamo wraps a float once it has changed between calls, as the scale of a LoRA adapter does.
    NumPy's floats still answer the ``item()`` of the graph.
    """
    pairs = zip(inputs, args, strict=True)
    return [argument.numpy()[()] if entry.number else argument for entry, argument in pairs]


def readable_path(source: str) -> str:
    """Shorten Dynamo's spelling: ``L['self']._modules['blocks'].0.attn`` -> ``blocks.0.attn``.

    What torch.export writes is a plain path already.
    """
    if _PLAIN_PATH.fullmatch(source):
        return source.removeprefix(_PEFT_WRAPPER)
    path = re.sub(r"\.(_old_)?forward\.__self__", "", source)  # a method that a hook put there
    path = re.sub(r"\.?__dict__|\.?\[?'?_(modules|parameters|buffers)'?\]?(?=[\[.])", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    parts = [part for part in path.split(".") if part]
    readable = ".".join(part for part in parts[1:] if part != "self")
    return readable.removeprefix(_PEFT_WRAPPER) or source


def module_path(node: Node) -> str:
    """Return the path of the innermost module that ``node`` came from, or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return readable_path(paths[-1]) if paths else ""


def capture(
    module: GraphModule,
    inputs: Sequence[GraphInput],
    args: Sequence[object],
    constants: Container[int] = (),
) -> CapturedGraph:
    """Trace ``module`` at the shapes of ``args``; numbers among ``args`` become constants.

    So do the tensors at the positions ``constants``.

    Raises:
        ConfigError: the graph writes in place, so that steps could not be rewritten safely, or its
            shapes depend on data.
    """
    given = {
        index: item
        for index, item in enumerate(args)
        if isinstance(item, Tensor) and index not in constants
    }
    positions = list(given)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in given.values()]

    def call(*tensors: Tensor) -> Any:
        full = list(args)
        for index, tensor in zip(positions, tensors, strict=True):
            full[index] = tensor
        return Interpreter(module).run(*full)

    with torch.no_grad(), fx_traceback.preserve_node_meta(), _data_dependence_refused():
        traced = make_fx(call, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    kept = tuple(inputs[index] for index in positions)
    dynamo_nodes = module.graph.find_nodes(op="placeholder")
    for index, node in zip(positions, traced.graph.find_nodes(op="placeholder"), strict=True):
        # Inductor reads this to know which inputs keep their address between calls.
        node.meta["tensor_dict"] = dynamo_nodes[index].meta.get("tensor_dict", {})
    _share_mode(traced, mode)
    _refuse_writes(functionalize(traced))
    canonicalize(traced)
    return CapturedGraph(traced, kept, recognize_attention(traced))


@contextmanager
def _data_dependence_refused() -> Generator[None]:
    try:
        yield
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise ConfigError(
            "the model's shapes or control flow depend on the content of its inputs",
            where="the transformer's graph",
            got=str(error).splitlines()[0],
            expected="one graph of fixed shapes",
            remedy="compute masks and lengths outside the model's forward",
        ) from error


def _share_mode(module: GraphModule, mode: FakeTensorMode) -> None:
    """Give all values one fake mode: what no input reaches, such as positions, had its own."""

    def shared(item: Any) -> Any:
        if not isinstance(item, FakeTensor) or item.fake_mode is mode:
            return item
        with mode:
            return torch.empty_strided(
                item.shape, item.stride(), dtype=item.dtype, device=item.device
            )

    for node in module.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(shared, node.meta["val"])


def _refuse_writes(writes: Sequence[Node]) -> None:
    for node in writes:
        raise ConfigError(
            "the model writes in place to an input, or to a tensor that it views elsewhere",
            where=str(node.meta.get("stack_trace", node.name)).strip(),
            got=node.target,
            remedy="use the out-of-place form of this operation in the model",
        )
