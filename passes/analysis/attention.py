"""Read off an attention node: what it attends to, its mask and scale, why it cannot be windowed."""

from __future__ import annotations

import math

from torch.fx import Node

from ditfastattn.passes.analysis.ancestry import Ancestry
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.graph.ir import argument, aten, value

_SHORTEST_WINDOWED_SEQUENCE = 8


def kind_of(node: Node, ancestry: Ancestry) -> SiteKind:
    """Return what an attention node attends to, by the inputs that its query and key depend on."""
    query, key = argument(node, 0, "query"), argument(node, 1, "key")
    if ancestry.roots(key) != ancestry.roots(query):
        return SiteKind.CROSS
    return SiteKind.JOINT if joins_streams(key) else SiteKind.SELF


def joins_streams(key: Node) -> bool:
    """Return whether the keys are concatenated, along the tokens, from several projections."""
    tokens = value(key).shape[-2]
    seen, pending = set(), [key]
    while pending:
        node = pending.pop()
        if node in seen or node.target is aten.linear.default:
            continue
        seen.add(node)
        if node.target is aten.cat.default and _concatenates(node, tokens):
            return True
        pending.extend(node.all_input_nodes)
    return False


def _concatenates(node: Node, tokens: int) -> bool:
    joined = value(node)
    dim = int(argument(node, 1, "dim", 0)) % joined.dim()
    return dim > 0 and bool(joined.shape[dim] == tokens) and joined.dim() >= 3


def why_no_window(node: Node, kind: SiteKind, tokens: int, text: tuple[int, int]) -> str:
    """Return why an attention node cannot be windowed, or "".

    ``tokens`` counts the image's, ``text`` the keys before and after them.
    """
    query, key = (list(value(source).shape) for source in node.args[:2])
    if kind is SiteKind.CROSS:
        return f"a band window is defined for self-attention, this is {kind}-attention"
    if kind is SiteKind.JOINT and not any(text):
        return _why_not_told_apart(query[-2], key[-2])
    if argument(node, 5, "is_causal", False):
        return "the attention is causal"
    if query[-2] == tokens:  # text tokens are keys alone
        query[-2] += sum(text)
    if query != key:
        return "queries and keys differ in shape"
    if tokens < _SHORTEST_WINDOWED_SEQUENCE:
        return f"only {tokens} tokens: a window would save nothing"
    return ""


def _why_not_told_apart(queries: int, keys: int) -> str:
    parts = "two parts of which only one depends on the latent"
    attending = f", which {queries} queries attend," if queries != keys else ""
    return f"its {keys} tokens{attending} are not joined from {parts}"


def attention_mask(node: Node) -> Node | None:
    """Return the mask of an attention node, or None."""
    mask: Node | None = argument(node, 3, "attn_mask")
    return mask


def attention_scale(node: Node) -> float:
    """Return the factor on QK^T of an attention node."""
    scale: float | None = argument(node, 6, "scale")
    return 1.0 / math.sqrt(value(node.args[0]).shape[-1]) if scale is None else scale
