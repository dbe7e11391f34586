"""Find which numbers of a graph stand for the batch, from captures at two batch sizes.

Passes work on fixed shapes; an exported graph must take any batch. Two captures of one model are
the same graph node by node, and a number that differs between them is a multiple of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ditfastattn.core.errors import ConfigError

FIX_BATCH = "export with a fixed batch: dynamic_batch=False (--fixed-batch)"


@dataclass(frozen=True)
class BatchSize:
    """Stand for ``factor`` times the batch of the model's inputs."""

    factor: Fraction


Size = int | BatchSize
Shape = tuple[Size, ...]


@dataclass(frozen=True)
class Symbols:
    """Hold a graph's arguments and shapes, the batch in them as ``BatchSize``."""

    args: dict[Node, tuple[Any, ...]]
    kwargs: dict[Node, dict[str, Any]]
    shapes: dict[Node, Shape | tuple[Shape, ...]]


def find_batch(first: GraphModule, second: GraphModule, batches: tuple[int, int]) -> Symbols:
    """Align two captures of one model at ``batches``; a module aligned with itself is fixed.

    Raises:
        ConfigError: the captures are not one graph, or a number is not a multiple of the batch.
    """
    symbols = Symbols({}, {}, {})
    nodes, others = list(first.graph.nodes), list(second.graph.nodes)
    if [(n.op, n.name) for n in nodes] != [(n.op, n.name) for n in others]:
        raise _difference(nodes, others, batches)
    for node, other in zip(nodes, others, strict=True):
        pairing = _Pairing(node.name, batches)
        symbols.args[node] = pairing.pair(node.args, other.args)
        symbols.kwargs[node] = pairing.pair(node.kwargs, other.kwargs)
        if "val" in node.meta:
            symbols.shapes[node] = pairing.shapes(node.meta["val"], other.meta["val"])
    return symbols


def _difference(
    nodes: Iterable[Node], others: Iterable[Node], batches: tuple[int, int]
) -> ConfigError:
    """Return the error that names the first operations that differ, and the model's line."""
    pairs = zip_longest(nodes, others)
    one, other = next((a, b) for a, b in pairs if not (a and b and _named(a) == _named(b)))
    first: Any = one or other
    said = [_said(one), _said(other)]
    if one and other and said[0] == said[1]:  # it stands elsewhere among the operations
        said = [f"{one.name}, {said[0]}", f"{other.name}, {said[1]}"]
    return ConfigError(
        "the model computes differently at another batch size",
        where=str(first.meta.get("stack_trace") or first.name).strip(),
        got=f"{said[0]} at batch {batches[0]}, {said[1]} at batch {batches[1]}",
        expected="the same operations at both",
        remedy=FIX_BATCH,
    )


def _named(node: Node) -> tuple[str, str]:
    return node.op, node.name


def _said(node: Node | None) -> str:
    if node is None:
        return "nothing"
    return str(node.target) if node.op == "call_function" else f"{node.op} {node.name}"


@dataclass(frozen=True)
class _Pairing:
    where: str
    batches: tuple[int, int]

    def pair(self, one: Any, other: Any) -> Any:
        """Merge two arguments of one call."""
        if isinstance(one, (tuple, list)):
            return tuple(self.pair(a, b) for a, b in zip(one, other, strict=True))
        if isinstance(one, dict):
            return {key: self.pair(item, other[key]) for key, item in one.items()}
        if isinstance(one, slice):
            return self.pair((one.start, one.stop, one.step), (other.start, other.stop, other.step))
        if isinstance(one, int) and not isinstance(one, bool) and one != other:
            return self._size(one, other)
        if isinstance(one, float) and one != other and not one != one:
            raise self._refused(one, other)
        return one

    def shapes(self, one: Any, other: Any) -> Any:
        """Merge two values' shapes."""
        if isinstance(one, Tensor):
            return tuple(self._size(a, b) for a, b in zip(one.shape, other.shape, strict=True))
        if isinstance(one, (tuple, list)):
            return tuple(self.shapes(a, b) for a, b in zip(one, other, strict=True))
        return ()

    def _size(self, one: int, other: int) -> Size:
        if one == other:
            return one
        factor = Fraction(one, self.batches[0])
        if factor != Fraction(other, self.batches[1]):
            raise self._refused(one, other)
        return BatchSize(factor)

    def _refused(self, one: float, other: float) -> ConfigError:
        return ConfigError(
            "a number depends on the batch in an unknown way",
            where=f"node {self.where}",
            got=f"{one} at batch {self.batches[0]}, {other} at batch {self.batches[1]}",
            expected="a multiple of the batch",
            remedy=FIX_BATCH,
        )
