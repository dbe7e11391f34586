"""Describe a range of blocks as a site: what the blocks add to the hidden stream.

A *boundary* is a place in the graph where the values that depend on the latent, and that later
nodes read, are independent of each other: the hidden stream, or both streams of joint attention.
Within a block there are others besides, which depend on the stream: a norm of it, or a branch still
to be added. So boundaries lie between blocks, and between attention and feed-forward.

A range lasts from the last boundary before its first site to the first one after its last site.
Each value at its end is followed back to its *base* at the beginning: of an addition, by the
operand that the other one is computed from. What the range adds is the difference of the two.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.fx import Node

from ditfastattn.passes.analysis.ancestry import Ancestry
from ditfastattn.passes.analysis.latent import latent_position
from ditfastattn.passes.analysis.site import NOT_OF_BLOCKS, Site, SiteKind, range_name
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import VIEWS, argument, aten, find, value

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_ELEMENTWISE = (
    *(aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.clamp.default),
    aten.nan_to_num.default,
)
Part = tuple[int, int, int]  # an axis, and the first and the last index of what is taken of it


class BlockRanges:
    """Find ranges of blocks in one captured graph."""

    def __init__(self, captured: CapturedGraph, sites: Sequence[Site]) -> None:
        """Take the ``sites`` of ``captured`` in the order of the graph.

        Raises:
            ValueError: what is denoised is not known.
        """
        self._graph = captured.module.graph
        self._sites = tuple(sites)
        position = latent_position(captured)
        if position is None:
            raise ValueError(
                "no input of the model has its output's size, so the latent is unknown"
            )
        latent = captured.inputs[position].name
        ancestry = Ancestry(captured, latent)
        nodes = [node for node in self._graph.nodes if node.op == "call_function"]
        self._moving = [node for node in nodes if latent in ancestry.roots(node)]
        self._place = {node: place for place, node in enumerate(self._moving)}
        self._last_use = {
            node: max((self._place.get(user, len(self._moving)) for user in node.users), default=-1)
            for node in self._moving
        }
        self._number: dict[Node, int] = {}
        self._ancestors: dict[Node, int] = {}  # as a set of bits, of what depends on an argument
        for node in self._graph.nodes:
            if node.op != "output" and not ancestry.is_static(node):
                self._follow(node)

    def _follow(self, node: Node) -> None:
        self._number[node] = len(self._number)
        found = 0
        for source in node.all_input_nodes:
            if source in self._number:
                found |= self._ancestors[source] | 1 << self._number[source]
        self._ancestors[node] = found

    def site(self, first: str, last: str) -> Site:
        """Return the range from the site ``first`` to the site ``last``.

        Raises:
            ValueError: there is no such range, with the reason.
        """
        names = [site.name for site in self._sites]
        for name in (first, last):
            if name not in names:
                raise ValueError(f"the model has no site {name}")
        start, end = names.index(first), names.index(last)
        if start > end:
            raise ValueError(f"{first} comes after {last}")
        for begin in self._beginnings(start):
            for stop in self._ends(end):
                pairs = self._pairs(begin, stop)
                if pairs:
                    return _describe(first, last, pairs)
        raise ValueError(
            f"around {first} to {last} there are no two places between which the hidden stream is "
            "all that is handed on, and goes on by additions"
        )

    def _beginnings(self, start: int) -> Iterator[int]:
        before = max((self._exit(site) for site in self._sites[:start]), default=0)
        inside = self._place[find(self._graph, self._sites[start].node)]
        return (place for place in reversed(range(before, inside)) if self._is_boundary(place))

    def _ends(self, end: int) -> Iterator[int]:
        after = min(
            (self._place[find(self._graph, site.node)] for site in self._sites[end + 1 :]),
            default=len(self._moving),
        )
        inside = self._exit(self._sites[end])
        return (place for place in range(inside, after) if self._is_boundary(place))

    def _exit(self, site: Site) -> int:
        return max(self._place[find(self._graph, name)] for name in site.exits)

    def _alive(self, place: int) -> list[Node]:
        """Return what later nodes read of what is computed up to ``place``."""
        return [node for node in self._moving[: place + 1] if self._last_use[node] > place]

    def _is_boundary(self, place: int) -> bool:
        alive = self._alive(place)
        bits = sum(1 << self._number[node] for node in alive)
        return all(not self._ancestors[node] & bits for node in alive)

    def _pairs(self, begin: int, stop: int) -> list[tuple[Node, Node]]:
        """Return each value that ends the range with its base; nothing where one has none."""
        pairs: list[tuple[Node, Node]] = []
        for node in self._alive(stop):
            if self._place[node] <= begin:
                continue  # what the range does not change
            base = self._base(node, begin)
            if base is None or not _alike(node, base):
                return []
            pairs.append((node, base))
        return pairs

    def _base(self, node: Node, begin: int) -> Node | None:
        """Return the value before the range that ``node`` goes on from, or None."""
        part: Part | None = None
        while self._place.get(node, -1) > begin:
            if node.target is aten.add.Tensor:
                found = self._carried(node)
            elif part is None and (taken := _taken(node)) is not None:
                found, part = taken
            elif node.target is aten.cat.default:
                found = _joined(node, part)
                part = None
            elif node.target in _ELEMENTWISE or (node.target in VIEWS and part is None):
                inputs = [each for each in node.all_input_nodes if each in self._number]
                found = inputs[0] if len(inputs) == 1 else None
            else:
                return None
            if found is None:
                return None
            node = found
        return node if part is None else None

    def _carried(self, addition: Node) -> Node | None:
        """Return the operand that carries the stream: the other one is computed from it."""
        operands = [each for each in addition.all_input_nodes if each in self._number]
        if len(operands) == 1:
            return operands[0]
        first, second = operands
        if self._ancestors[second] >> self._number[first] & 1:
            return first
        return second if self._ancestors[first] >> self._number[second] & 1 else None


def _describe(first: str, last: str, pairs: Sequence[tuple[Node, Node]]) -> Site:
    shapes = [value(node).shape for node, _ in pairs]
    return Site(
        name=range_name(first, last),
        ordinal=-1,
        node=pairs[0][0].name,
        exits=tuple(node.name for node, _ in pairs),
        bases=tuple(base.name for _, base in pairs),
        kind=SiteKind.BLOCKS,
        tokens=sum(shape[:-1].numel() // shape[0] for shape in shapes),
        heads=1,
        head_dim=shapes[0][-1],
        grid=(),
        window=0,
        no_window="a window is defined for attention, this is a range of blocks",
        no_shared_guidance=NOT_OF_BLOCKS,
        ends=(first, last),
    )


def _alike(node: Node, base: Node) -> bool:
    one, other = node.meta["val"], base.meta["val"]
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return (one.shape, one.dtype) == (other.shape, other.dtype) and one.dim() > 1


def _taken(node: Node) -> tuple[Node, Part] | None:
    """Return of what ``node`` takes a part along one axis, and which; None for another call."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if node.target is aten.slice.Tensor and argument(node, 4, "step", 1) == 1:
        axis = int(argument(node, 1, "dim", 0)) % value(source).dim()
        size = value(source).shape[axis]
        start, stop, _ = slice(argument(node, 2, "start"), argument(node, 3, "end")).indices(size)
        return source, (axis, start, stop)
    if node.target is operator.getitem and source.target in _SPLITS:
        whole: Node = source.args[0]  # type: ignore[assignment]  # what is split is a node
        axis = int(argument(source, 2, "dim", 0)) % value(whole).dim()
        sizes = [part.shape[axis] for part in source.meta["val"]]
        which = int(node.args[1])  # type: ignore[arg-type]  # of a tuple of tensors
        return whole, (axis, sum(sizes[:which]), sum(sizes[: which + 1]))
    return None


def _joined(cat: Node, part: Part | None) -> Node | None:
    """Return which of the values that ``cat`` joins is just ``part`` of it, or None."""
    axis = int(argument(cat, 1, "dim", 0)) % value(cat).dim()
    if part is None or part[0] != axis:
        return None
    start = 0
    for each in cat.args[0]:  # type: ignore[union-attr]  # a list of nodes
        stop = start + value(each).shape[axis]
        if (start, stop) == part[1:]:
            found: Node = each  # type: ignore[assignment]  # see above
            return found
        start = stop
    return None
