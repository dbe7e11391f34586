"""Compute routed experts for all tokens: a module that stayed whole as a graph of fixed shapes.

A router sends each token to some of its experts. Its code sorts the tokens by expert, reads how
many go where, and runs each expert on its own run of them, so that every call has other shapes.
Weights of zero choose as well: each expert runs on all tokens. Before, in a trace of one call::

    %5 = aten.argsort.default(%experts): int64[96]           two for each of 48 tokens
    %6 = aten.floor_divide.default(%5, 2): int64[96]
    %7 = aten.slice.Tensor(%6, 0, 21, 42): int64[21]         the tokens of expert 1
    %8 = aten.index.Tensor(%x, [%7]): float32[21, 16]
    %9 = ...the expert...: float32[21, 16]
    %10 = aten.slice.Tensor(%5, 0, 21, 42): int64[21]
    %11 = aten.index.Tensor(%weights, [%10]): float32[21, 1]
    %12 = aten.mul.Tensor(%9, %11): float32[21, 16]
    %13 = aten.scatter_reduce.two(%sum, 0, %7, %12, "sum"): float32[48, 16]

After::

    %9 = ...the expert, of %x...: float32[48, 16]
    %11 = (the weights where %experts are 1, else 0, added per token): float32[48, 1]
    %12 = aten.mul.Tensor(%9, %11): float32[48, 16]
    %13 = aten.add.Tensor(%sum, %12): float32[48, 16]

The price is the work of the experts that were not chosen. The graph is compared with the module on
inputs that are routed otherwise than those of the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ditfastattn.passes.capture.functionalize import functionalize
from ditfastattn.passes.capture.opaque_blocks import OPAQUE_BLOCK, OpaqueBlock, block_named
from ditfastattn.passes.graph.fake_values import empty_like, fake_mode
from ditfastattn.passes.graph.ir import aten, calls, value

_ATTEMPTS = 8  # to find inputs of which each expert gets some
_SORTS = (aten.argsort.default, aten.argsort.stable)
_SAME_ORDER = (
    *(aten.view.default, aten.reshape.default, aten.unsqueeze.default),
    *(aten.repeat.default, aten.expand.default),
)
_ADDITIONS = (aten.scatter_reduce.two, aten.scatter_reduce_.two)


def inline_blocks(module: GraphModule) -> int:
    """Replace the modules that stayed whole in ``module``, in place; return how many there were.

    Raises:
        ValueError: one of them has no graph of fixed shapes.
    """
    found = calls(module.graph, OPAQUE_BLOCK)
    for node in found:
        sources: Any = node.args[0]
        _paste(module, node, sources, form_of(str(node.args[1])))
    if found:
        module.recompile()
    return len(found)


@lru_cache(maxsize=256)  # the steps of a plan share a model's
def form_of(block: str) -> GraphModule:
    """Return what ``block`` computes, as a graph of fixed shapes over its tensors.

    Raises:
        ValueError: its data flow is not that of routed experts.
    """
    opaque = block_named(block)
    with torch.no_grad():
        for seed in range(_ATTEMPTS):
            examples = _examples(opaque, seed)
            trace = _traced(lambda *given: opaque.run(given), examples)
            reaches = _reaches(trace)
            if reaches is not None:
                break
        else:
            raise ValueError("no tokens are sorted by expert, each of which gets some")
        form = _traced(_AllTokens(trace, *reaches).run, examples)
        if functionalize(form):
            raise ValueError("it writes to a tensor that others share")
        _compare(opaque, form, _examples(opaque, _ATTEMPTS))
    return form


def _traced(function: Callable[..., Any], examples: Sequence[Tensor]) -> GraphModule:
    module: GraphModule = make_fx(function, pre_dispatch=True)(*examples)
    for node in calls(module.graph, torch._C._set_grad_enabled):
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _examples(block: OpaqueBlock, seed: int) -> list[Tensor]:
    """Return random inputs of ``block``, weights among them, of its shapes."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for like in block.inputs:
        item = torch.zeros(like.shape, dtype=like.dtype)
        if like.is_floating_point():
            scale = like.shape[-1] ** -0.5 if like.dim() else 1.0
            item.normal_(0.0, scale, generator=generator)
        made.append(item)
    made[0] = made[0] * made[0].shape[-1] ** 0.5  # what is routed
    return made


def _reaches(trace: GraphModule) -> tuple[int, list[tuple[int, int]]] | None:
    """Return how many experts a token has, and the run of the sorted tokens that each gets.

    None where an expert gets none, or nothing is sorted.
    """
    sorts = calls(trace.graph, *_SORTS)
    tops = calls(trace.graph, aten.topk.default)
    if len(sorts) != 1 or len(tops) != 1:
        return None
    order = {sorts[0], *(user for user in sorts[0].users if _divides(user))}
    slices = [user for node in order for user in node.users if user.target is aten.slice.Tensor]
    runs = sorted({(int(node.args[2]), int(node.args[3])) for node in slices})  # type: ignore[arg-type]
    experts: int = value(tops[0].args[0]).shape[-1]
    edges = [0, *(end for _, end in runs)]
    joined = [start for start, _ in runs] == edges[:-1] and edges[-1] == value(sorts[0]).numel()
    return (int(tops[0].args[1]), runs) if joined and len(runs) == experts else None  # type: ignore[arg-type]


def _divides(node: Node) -> bool:
    return node.target is aten.floor_divide.default


def _compare(block: OpaqueBlock, form: GraphModule, examples: Sequence[Tensor]) -> None:
    for ours, theirs in zip(form(*examples), block.run(examples), strict=True):
        largest = float(theirs.abs().max())
        if not float((ours - theirs).abs().max()) <= torch.finfo(theirs.dtype).eps ** 0.5 * largest:
            raise ValueError("with every expert on all tokens it computes something else")


@dataclass(frozen=True)
class _Sorted:
    """Stand for the order of tokens by expert: places among ``experts``, or tokens."""

    experts: Tensor  # [tokens * per token]
    of_tokens: bool = False


@dataclass(frozen=True)
class _Chosen:
    """Stand for the run of an order that is one expert's."""

    order: _Sorted
    expert: int


class _AllTokens(Interpreter):
    """Run a trace of routed experts with every expert on all tokens."""

    def __init__(self, trace: GraphModule, per_token: int, runs: list[tuple[int, int]]) -> None:
        super().__init__(trace)
        self._per_token, self._runs = per_token, runs
        rules: dict[Any, Callable[..., Any]] = {
            **dict.fromkeys(_SORTS, self._sort),
            aten.floor_divide.default: self._tokens,
            aten.slice.Tensor: self._run_of,
            aten.index.Tensor: self._rows,
            **dict.fromkeys(_SAME_ORDER, lambda chosen, *_: chosen),
            **dict.fromkeys(_ADDITIONS, self._add),
        }
        self._rules = rules

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Follow the order of tokens; compute everything else."""
        marked = any(isinstance(leaf, _Sorted | _Chosen) for leaf in pytree.tree_leaves(args))
        if not marked and target not in _SORTS:
            return super().call_function(target, args, kwargs)
        if target not in self._rules:
            raise ValueError(f"{target} takes the order of tokens by expert")
        return self._rules[target](*args, **kwargs)

    def _sort(self, experts: Tensor, *options: Any, **named: Any) -> _Sorted:
        if experts.dim() != 1 or any(options) or named.get("descending"):
            raise ValueError("the tokens are not sorted by expert, the first one first")
        return _Sorted(experts)

    def _tokens(self, order: _Sorted, divisor: int) -> _Sorted:
        if divisor != self._per_token:
            raise ValueError(f"the order of tokens is divided by {divisor}")
        return replace(order, of_tokens=True)

    def _run_of(self, order: _Sorted, _: int, start: int, end: int) -> _Chosen:
        return _Chosen(order, self._runs.index((start, end)))

    def _rows(self, source: Tensor, places: Sequence[Any]) -> Tensor:
        (chosen,) = places
        order = chosen.order
        if order.of_tokens:
            return source
        rest = source.shape[1:]
        own = (order.experts == chosen.expert).view(-1, *(1 for _ in rest))
        given = torch.where(own, source, torch.zeros_like(source))
        return given.view(-1, self._per_token, *rest).sum(1)

    def _add(self, total: Tensor, _: int, __: _Chosen, source: Tensor, reduce: str) -> Tensor:
        if reduce != "sum":
            raise ValueError(f"what experts return is combined by {reduce}")
        return total + source


def _paste(module: GraphModule, node: Node, sources: Sequence[Node], form: GraphModule) -> None:
    """Put ``form`` in the place of ``node``, whose results are picked by number."""
    graph = module.graph
    mode = fake_mode(graph)
    fakes = [empty_like(mode, value(source)) for source in sources]
    with torch.no_grad():
        made = _traced(lambda *given: form(*given), fakes)
    inputs = made.graph.find_nodes(op="placeholder")
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(made.graph, dict(zip(inputs, sources, strict=True)))
    for user in list(node.users):
        assert user.target is getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
