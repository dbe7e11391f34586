"""Name groups of an attention's heads, and mark their nodes in a graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

_HEADS = "heads"


@dataclass(frozen=True)
class HeadRange:
    """Name the heads ``first`` to ``last`` (exclusive) of ``site``.

    It marks the attention of a group, the slices that it reads and, with all heads, the node that
    joins the groups.
    """

    site: str
    first: int
    last: int


def mark(node: Node, heads: HeadRange) -> Node:
    """Mark ``node`` as belonging to ``heads``, and return it."""
    node.meta[_HEADS] = heads
    return node


def head_range(item: object) -> HeadRange | None:
    """Return the heads that a node is marked with, or None."""
    found: HeadRange | None = item.meta.get(_HEADS) if isinstance(item, Node) else None
    return found


def group_name(site: str, first: int, last: int) -> str:
    """Name the site of the heads ``first`` to ``last`` (exclusive) of ``site``."""
    return f"{site}.heads_{first}_{last}"


def even_groups(heads: int, count: int) -> tuple[int, ...]:
    """Return the sizes of ``count`` groups of ``heads`` heads; they differ by one at most.

    There are never more groups than heads.
    """
    count = min(heads, count)
    return tuple(heads * (index + 1) // count - heads * index // count for index in range(count))
