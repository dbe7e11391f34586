"""Turn what Dynamo captured into one ATen-level graph of fixed shapes.

Attention, linear and normalization stay whole operators (tracing happens before dispatch), and
each node keeps the path of the module it came from. Inputs are *static* (the model's parameters and
buffers) or *dynamic* (the arguments of the call).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.capture.canonicalize import canonicalize
from ditfastattn.passes.capture.captured_graph import CapturedGraph, GraphInput
from ditfastattn.passes.capture.functionalize import functionalize
from ditfastattn.passes.capture.plain_tensors import parts, rebuilt
from ditfastattn.passes.capture.recognize_attention import Unrecognized, recognize_attention
from ditfastattn.passes.graph.fake_values import empty_like
from ditfastattn.passes.graph.lazy_code import traced_lazily
from ditfastattn.passes.graph.origin import is_marked_static, readable_path

_READS_VALUE = "trying to get value out of a tracing tensor"  # in make_fx's error


def describe_inputs(module: GraphModule) -> tuple[GraphInput, ...]:
    """Return the names and kinds of the inputs of a graph that Dynamo made."""
    return tuple(_describe(node) for node in module.graph.find_nodes(op="placeholder"))


def _describe(node: Node) -> GraphInput:
    static = is_marked_static(node)
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


def refuse_autocast(tensors: Iterable[Tensor]) -> None:
    """Raise ``ConfigError`` where autocast is on for the device of one of ``tensors``.

    Operators are captured before autocast would cast their arguments: a graph is of one set of
    dtypes, and equal graphs are compiled once.
    """
    for kind in {tensor.device.type for tensor in tensors}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            raise ConfigError(
                "a plan runs a model in its own dtype, not under autocast",
                where="a call of the transformer",
                got=f"torch.autocast({kind!r}, {torch.get_autocast_dtype(kind)})",
                remedy="load the pipeline in that dtype (torch_dtype=...), and leave autocast off",
            )


def capture(
    module: GraphModule,
    inputs: Sequence[GraphInput],
    args: Sequence[object],
    constants: Container[int] = (),
) -> CapturedGraph:
    """Trace ``module`` at the shapes of ``args``; numbers among ``args`` become constants.

    So do the tensors at the positions ``constants``. The graph takes ``plain_tensors(args)``.

    Raises:
        ConfigError: the graph writes in place, so that steps could not be rewritten safely, its
            shapes depend on data, or autocast is on.
    """
    given = {
        index: item
        for index, item in enumerate(args)
        if isinstance(item, Tensor) and index not in constants
    }
    refuse_autocast(given.values())
    flat = [
        (index, name, part)
        for index, tensor in given.items()
        for name, part in parts(tensor, inputs[index].name)
    ]
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=_fixed_shapes(), static_shapes=True)
    fakes = [mode.from_tensor(part, static_shapes=True) for _, _, part in flat]

    def call(*tensors: Tensor) -> Any:
        full, plain = list(args), iter(tensors)
        for index, tensor in given.items():
            full[index] = rebuilt(tensor, plain)
        return Interpreter(module).run(*full)

    with (
        torch.no_grad(),
        traced_lazily(),
        fx_traceback.preserve_node_meta(),
        _data_dependence_refused(),
    ):
        traced = make_fx(call, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    kept = tuple(replace(inputs[index], name=name) for index, name, _ in flat)
    dynamo_nodes = module.graph.find_nodes(op="placeholder")
    for (index, _, _), node in zip(flat, traced.graph.find_nodes(op="placeholder"), strict=True):
        # Inductor reads this to know which inputs keep their address between calls.
        node.meta["tensor_dict"] = dynamo_nodes[index].meta.get("tensor_dict", {})
    share_mode(traced, mode)
    return CapturedGraph(traced, kept, finish(traced))


def finish(
    traced: GraphModule, between: Callable[[], None] | None = None
) -> tuple[Unrecognized, ...]:
    """Bring what was traced into the form of captured graphs; return attention that is unknown.

    ``between`` is called once the graph writes nothing in place.
    """
    _refuse_writes(functionalize(traced))
    if between is not None:
        between()
    canonicalize(traced)
    _refuse_unknown_constants(traced)
    return recognize_attention(traced)


def _refuse_unknown_constants(traced: GraphModule) -> None:
    """Refuse constants without content: what was written to them in ``vmap`` was not traced."""
    for node in traced.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(traced, str(node.target), None), FakeTensor):
            user = next(iter(node.users))
            raise ConfigError(
                "a value that the model computes cannot be traced",
                where=str(user.meta.get("stack_trace", node.name)).strip(),
                got="writes in place within torch.vmap",
                expected="operators that return what they compute",
                remedy="use the out-of-place form of this operation in the model",
            )


class DataDependenceError(ConfigError):
    """Report a graph that depends on what its inputs hold."""


def _fixed_shapes() -> ShapeEnv:
    """Return an environment without symbols: Inductor's cache on disk asks for one."""
    return ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)


@contextmanager
def _data_dependence_refused() -> Generator[None]:
    try:
        yield
    except (DynamicOutputShapeException, DataDependentOutputException, RuntimeError) as error:
        reads = isinstance(error, (DynamicOutputShapeException, DataDependentOutputException))
        if not reads and _READS_VALUE not in str(error):
            raise
        raise DataDependenceError(
            "the model's shapes or control flow depend on the content of its inputs",
            where="the transformer's graph",
            got=str(error).splitlines()[0],
            expected="one graph of fixed shapes",
            remedy="run it by accelerate(pipeline), which traces such calls, or compute masks and "
            "lengths outside the model's forward",
        ) from error


def share_mode(module: GraphModule, mode: FakeTensorMode | None = None) -> None:
    """Give all values one fake mode; positions, which depend on no input, had their own."""
    mode = FakeTensorMode(allow_non_fake_inputs=True) if mode is None else mode

    def shared(item: Any) -> Any:
        if not isinstance(item, FakeTensor) or item.fake_mode is mode:
            return item
        return empty_like(mode, item)

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
