"""Compute neighbouring groups of heads that take the same strategy as one attention; exact.

Before::

    %3 = aten.slice.Tensor(%0, 1, 0, 1): float32[2, 1, 64, 8]
    ...
    %9 = aten.scaled_dot_product_attention.default(%3, %5, %7): float32[2, 1, 64, 8]
    %10 = aten.transpose.int(%9, 1, 2): float32[2, 64, 1, 8]
    %11 = aten.scaled_dot_product_attention.default(%4, %6, %8): float32[2, 3, 64, 8]
    %12 = aten.transpose.int(%11, 1, 2): float32[2, 64, 3, 8]
    %13 = aten.cat.default([%10, %12], 2): float32[2, 64, 4, 8]
    %14 = aten.transpose.int(%13, 1, 2): float32[2, 4, 64, 8]

After, where both groups are computed in full; a step whose heads agree is as if never split::

    %9 = aten.scaled_dot_product_attention.default(%0, %1, %2): float32[2, 4, 64, 8]

What else reads the output of a group, such as a cache, gets a slice of the merged one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.head_groups import HeadRange, head_range, mark
from ditfastattn.passes.graph.ir import ATTENTION, argument, aten, calls, insert, outputs, value
from ditfastattn.passes.graph.slots import written_slots
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.rewrites.base import PassResult
from ditfastattn.passes.rewrites.eliminate_dead_code import EliminateDeadCode
from ditfastattn.passes.windows.forms import WINDOWED


@dataclass(frozen=True)
class MergeHeads:
    """Merge neighbours of equal strategy among ``groups``: sites and what each does."""

    groups: tuple[tuple[Site, Strategy], ...]
    name: str = "merge-heads"
    requires: tuple[str, ...] = ()

    def run(self, module: GraphModule) -> PassResult:
        """Merge, then take the slices away that only put together what was merged."""
        if not self.groups:
            return PassResult(0)
        graph = module.graph
        strategies = {
            (site.whole.name, site.first_head): strategy
            for site, strategy in self.groups
            if site.whole is not None
        }
        erased = EliminateDeadCode().run(module).changed
        runs = [run for run in _runs(graph, strategies) if len(run) > 1]
        for run in runs:
            _merge(graph, run)
        wholes = {site.whole.node for site, _ in self.groups if site.whole is not None}
        for node in [node for node in graph.nodes if node.name in wholes]:
            _join(graph, node)
        copied = _copy_cached_slices(graph)
        return PassResult(erased + sum(map(len, runs)) + copied)


def _runs(
    graph: Graph, strategies: dict[tuple[str, int], Strategy]
) -> list[list[tuple[Node, HeadRange]]]:
    """Return the attentions of groups in lists: neighbours that one attention can compute."""
    runs: list[list[tuple[Node, HeadRange]]] = []
    for node in calls(graph, ATTENTION, *WINDOWED):
        heads = head_range(node.args[0])
        if heads is None:
            continue
        for run in runs:
            last, before = run[-1]
            if (
                (before.site, before.last) == (heads.site, heads.first)
                and strategies.get((before.site, before.first))
                is strategies.get((heads.site, heads.first))
                and _whole_call(last) == _whole_call(node)
            ):
                run.append((node, heads))
                break
        else:
            runs.append([(node, heads)])
    return runs


def _whole_call(node: Node) -> tuple[Any, ...]:
    """Return what ``node`` calls, with what its slices of heads are taken from."""
    args: Any = map_arg((node.args, node.kwargs), _unsliced)
    return node.target, args


def _unsliced(node: Node) -> Node:
    source: Any = node if head_range(node) is None else node.args[0]
    whole: Node = source
    return whole


def _merge(graph: Graph, run: Sequence[tuple[Node, HeadRange]]) -> None:
    """Replace the attentions of ``run`` by slices of one."""
    node = run[0][0]
    heads = HeadRange(run[0][1].site, run[0][1].first, run[-1][1].last)

    def widened(item: Node) -> Node:
        if head_range(item) is None:
            return item
        source: Any = item.args[0]
        dim: Any = item.args[1]
        if heads.first == 0 and heads.last == value(source).shape[dim]:
            whole: Node = source
            return whole
        bounds = (source, dim, heads.first, heads.last)
        return mark(insert(graph, aten.slice.Tensor, bounds, item), heads)

    with graph.inserting_before(node):
        args: Any = map_arg(node.args, widened)
        kwargs: Any = map_arg(node.kwargs, widened)
        merged = insert(graph, node.target, args, node, dict(kwargs))
        for each, own in run:
            bounds = (merged, 1, own.first - heads.first, own.last - heads.first)
            part = insert(graph, aten.slice.Tensor, bounds, each)
            each.replace_all_uses_with(part)
    for each, _ in run:
        graph.erase_node(each)


def _join(graph: Graph, whole: Node) -> None:
    """Let ``whole`` put together what was merged, and not its slices."""
    swapped = whole.target is aten.transpose.int
    joined: Any = whole.args[0] if swapped else whole
    parts: list[Node] = []
    rest = list(argument(joined, 0, "tensors"))
    while rest:
        merged = _slice_of(rest[0], swapped)
        count = 0 if merged is None else _covering(merged, rest, swapped)
        if merged is None or not count:
            parts.append(rest.pop(0))
            continue
        if count == len(rest) and not parts:
            whole.replace_all_uses_with(merged)
            return
        with graph.inserting_before(joined):
            moved = (merged, 1, 2)
            parts.append(insert(graph, aten.transpose.int, moved, joined) if swapped else merged)
        del rest[:count]
    joined.args = (parts, joined.args[1])


def _copy_cached_slices(graph: Graph) -> int:
    """Copy what a group's cache holds of a merged attention; a slice would keep all of it alive.

    Return how many copies were made.
    """
    copied = 0
    written = outputs(graph)[len(outputs(graph)) - len(written_slots(graph)) :]
    for node in written:
        if not isinstance(node, Node):
            continue
        merged = _slice_of(node, node.target is aten.transpose.int)
        if merged is not None and merged.target is ATTENTION:
            with graph.inserting_after(node):
                copy = insert(graph, aten.clone.default, (node,), node)
            graph.output_node().replace_input_with(node, copy)
            copied += 1
    return copied


def _slice_of(part: Node, swapped: bool) -> Node | None:
    """Return what ``part`` is a slice of heads of, moved behind the tokens where ``swapped``."""
    if swapped:
        if part.target is not aten.transpose.int:
            return None
        part = part.all_input_nodes[0]
    is_slice = part.target is aten.slice.Tensor and part.args[1] == 1
    return part.all_input_nodes[0] if is_slice else None


def _covering(merged: Node, parts: Sequence[Node], swapped: bool) -> int:
    """Return how many of the first ``parts`` are all of ``merged`` in order, or 0."""
    covered = 0
    for count, part in enumerate(parts, 1):
        piece = part.all_input_nodes[0] if swapped else part
        if _slice_of(part, swapped) is not merged or piece.args[2] != covered:
            return 0
        end: Any = piece.args[3]
        covered = end
        if covered == value(merged).shape[1]:
            return count
    return 0
