"""Replace a graph's node by a plain function, traced at the node's shapes.

Equal nodes share a trace. Constants that the function takes become buffers; equal ones share a
buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import flex_attention as flex

from ditfastattn.passes.graph.fake_values import empty_like, fake_mode
from ditfastattn.passes.graph.ir import value
from ditfastattn.passes.graph.lazy_code import traced_lazily

Form = Callable[..., Tensor]  # (q, k, v[, mask], *constants) -> output, all [B, H, N, D]
Constants = tuple[Tensor, ...]


@dataclass(frozen=True)
class FormPaster:
    """Replace attentions of ``module`` by forms, the plain functions that compute them."""

    module: GraphModule
    traces: dict[Hashable, GraphModule] = field(default_factory=dict)
    attributes: dict[int, str] = field(default_factory=dict)  # id of a buffer or module -> its name

    def replace(self, node: Node, key: Hashable, form: Form, constants: Constants) -> None:
        """Replace ``node``, an attention within a window, by ``form``; ``key`` identifies it."""
        values = [value(source) for source in sources(node)]
        layouts = tuple((item.shape, item.stride(), item.dtype) for item in values)
        known = (key, layouts)
        if known not in self.traces:
            self.traces[known] = self._trace(form, node, constants)
        self._paste(self.traces[known], node, constants)

    def _trace(self, form: Form, node: Node, constants: Constants) -> GraphModule:
        mode = fake_mode(self.module.graph)
        # Fresh fakes: tracing identifies its inputs by object, and two nodes may share a value.
        examples = [empty_like(mode, value(source)) for source in sources(node)]
        examples += [mode.from_tensor(constant) for constant in constants]

        def call(*inputs: Tensor) -> Tensor:  # a plain function: tracing refuses methods
            return form(*inputs)

        with torch.no_grad(), traced_lazily(), _flex_traced_directly():
            trace = make_fx(call, pre_dispatch=True)(*examples)
        trace.graph.eliminate_dead_code()
        return trace

    def _paste(self, trace: GraphModule, node: Node, constants: Constants) -> None:
        graph = self.module.graph
        inputs = trace.graph.find_nodes(op="placeholder")
        given = sources(node)
        copies = dict(zip(inputs[: len(given)], given, strict=True))
        with graph.inserting_before(node):
            for inner, constant in zip(inputs[len(given) :], constants, strict=True):
                copies[inner] = graph.get_attr(self._attribute("window_constant", constant))
                copies[inner].meta["val"] = inner.meta["val"]
            for inner in trace.graph.nodes:
                if inner.op == "get_attr":  # FlexAttention's functions of scores and masks
                    body = getattr(trace, str(inner.target))
                    copies[inner] = graph.get_attr(self._attribute(str(inner.target), body))
                elif inner.op == "call_function":
                    copies[inner] = graph.node_copy(inner, copies.__getitem__)
                    _take_origin(copies[inner], node)
        node.replace_all_uses_with(copies[trace.graph.output_node().args[0]])
        graph.erase_node(node)

    def _attribute(self, prefix: str, item: Tensor | torch.nn.Module) -> str:
        """Return the name of ``item`` on the module; register it on first use."""
        if id(item) not in self.attributes:
            names = (f"{prefix}_{index}" for index in count())
            name = next(name for name in names if not hasattr(self.module, name))
            if isinstance(item, Tensor):
                self.module.register_buffer(name, item, persistent=False)
            else:
                self.module.add_module(name, item)
            self.attributes[id(item)] = name
        return self.attributes[id(item)]


def sources(node: Node) -> tuple[Node, ...]:
    """Return query, key and value, and the mask where there is one."""
    return tuple(argument for argument in node.args if isinstance(argument, Node))


def is_masked(node: Node) -> bool:
    """Return whether ``node`` has a mask."""
    return len(sources(node)) > 3


def has_static_shape(node: Node) -> bool:
    """Return whether the shapes of all sources are numbers."""
    return all(isinstance(size, int) for source in sources(node) for size in value(source).shape)


def token_major(output: Tensor) -> Tensor:
    """Lay ``[B, H, N, D]`` out in memory as ``[B, N, H, D]``, as window operators promise."""
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _take_origin(copy: Node, node: Node) -> None:
    for key in ("stack_trace", "nn_module_stack"):
        copy.meta.pop(key, None)
        if key in node.meta:
            copy.meta[key] = node.meta[key]


@contextmanager
def _flex_traced_directly() -> Generator[None]:
    """Keep FlexAttention from calling ``torch.compile`` while it is traced.

    That would start Dynamo within our own tracing: several times slower, and with a warning.
    """
    previous = flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = previous
