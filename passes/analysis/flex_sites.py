"""Describe FlexAttention as a site: it may share, and has no window but the model's own mask."""

from __future__ import annotations

from torch.fx import Node

from ditfastattn.passes.analysis.ancestry import Ancestry
from ditfastattn.passes.analysis.attention import kind_of
from ditfastattn.passes.analysis.exits import exits_of
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.ir import value


def why_no_flex_site(node: Node) -> str:
    """Return why a FlexAttention, whose results are ``(output, logsumexp, maxima)``, is no site."""
    others = [user for user in node.users if user.args[1] != 0 and user.users]
    return "the model reads the sums of its scores, too" if others or not node.users else ""


def describe_flex(node: Node, name: str, ancestry: Ancestry) -> Site:
    """Return the site of ``node``, called ``name``."""
    _, heads, tokens, head_dim = value(node.args[0]).shape
    output = next(user for user in node.users if user.args[1] == 0)
    ends = exits_of(output, ancestry)
    return Site(
        name=name,
        ordinal=-1,  # the plan interpreter does not see it
        node=output.name,
        exits=tuple(member.name for member in ends),
        kind=kind_of(node, ancestry),
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        grid=(),
        window=0,
        no_window="it is FlexAttention, with a mask of the model's own",
        no_shared_guidance=ancestry.why_no_shared_guidance(ends),
    )
