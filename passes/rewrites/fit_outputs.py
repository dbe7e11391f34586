"""Make the model's whole output of its latent and of outputs of earlier steps, by coefficients.

The coefficients are a plan's (see ``Plan.coefficients`` of a site), fitted on calibration
trajectories; they are inputs of the graph, so that all steps, and all plans, share one variant. All
is computed in fp32. Nothing else of the step is left.

Before::

    %2 = input sample: float32[4, 4, 8, 8]
    ...
    %90 = aten.view.default(%89, [4, 4, 8, 8]): float32[4, 4, 8, 8]
    return [%90]

After, of one earlier output, with both guidance branches in the batch; alike for the second half::

    %2 = input sample: float32[4, 4, 8, 8]
    %3 = input cache_output_factor_0: float32[]
    ...
    %9 = input cache_output_output_0: float32[4, 4, 8, 8]
    %10 = aten.slice.Tensor(%2, 0, 0, 2): float32[2, 4, 8, 8]
    %11 = aten.slice.Tensor(%9, 0, 0, 2): float32[2, 4, 8, 8]
    %12 = aten.slice.Tensor(%9, 0, 2, 4): float32[2, 4, 8, 8]
    %13 = aten.mul.Tensor(%10, %3): float32[2, 4, 8, 8]
    %14 = aten.mul.Tensor(%11, %4): float32[2, 4, 8, 8]
    %15 = aten.add.Tensor(%13, %14): float32[2, 4, 8, 8]
    ...
    %25 = aten.cat.default([%17, %24]): float32[4, 4, 8, 8]
    return [%25]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.ir import aten, find, insert, value
from ditfastattn.passes.graph.slots import factor_slots, output_slot, read_cache
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.strategies import Strategy, fitted_terms
from ditfastattn.passes.rewrites.base import PassResult
from ditfastattn.passes.rewrites.keep_apart import keep_caches_apart
from ditfastattn.passes.rewrites.reuse_outputs import Expression, read_factor


@dataclass(frozen=True)
class FitOutputs:
    """Replace the exit node of each of ``sites`` by a weighted sum of latent and outputs."""

    sites: tuple[tuple[Site, Strategy], ...]
    layout: CfgLayout
    name: str = "fit-outputs"
    requires: tuple[str, ...] = ("store-caches",)

    def run(self, module: GraphModule) -> PassResult:
        """Replace each exit node."""
        for site, strategy in self.sites:
            _fit(module.graph, site, strategy, self.layout)
        return PassResult(len(self.sites) + keep_caches_apart(module.graph))


def _fit(graph: Graph, site: Site, strategy: Strategy, layout: CfgLayout) -> None:
    (member,) = site.exits
    node = find(graph, member)
    latent = _shaped(graph, find(graph, site.latent_node), node)
    ages = range(strategy.outputs_read)
    held = [read_cache(graph, output_slot(site.name, 0, age), value(node)) for age in ages]
    branches = layout.branches if layout.batched else 1
    count = fitted_terms(strategy.outputs_read, layout.batched)
    factors = [read_factor(graph, slot, node) for slot in factor_slots(site.name, branches * count)]
    rows = [factors[branch * count : (branch + 1) * count] for branch in range(branches)]
    made = [
        _summed(_terms(latent, held, branch, layout.batched, node), row, strategy, node)
        for branch, row in enumerate(rows)
    ]
    with graph.inserting_before(node):
        whole = made[0]
        if len(made) > 1:
            whole = insert(graph, aten.cat.default, (made,), node)
        if value(whole).dtype != value(node).dtype:
            whole = insert(graph, aten.to.dtype, (whole, value(node).dtype), node)
    node.replace_all_uses_with(whole)


def _terms(
    latent: Node, held: Sequence[Node], branch: int, batched: bool, place: Node
) -> list[Node]:
    """Return what the output of ``branch`` is the sum of."""
    if not batched:
        return [latent, *held]
    halves = [_half(output, each, place) for output in held for each in (0, 1)]
    return [_half(latent, branch, place), *halves]


def _half(node: Node, branch: int, place: Node) -> Node:
    """Return the half of ``node`` that belongs to ``branch``, made at most once."""
    rows = value(node).shape[0]
    bounds = (rows // 2, rows) if branch else (0, rows // 2)
    args = (node, 0, *bounds)
    for user in node.users:
        if user.target is aten.slice.Tensor and user.args == args:
            return user
    with place.graph.inserting_before(place):
        return insert(place.graph, aten.slice.Tensor, args, place)


def _summed(
    terms: Sequence[Node], factors: Sequence[Node], strategy: Strategy, place: Node
) -> Node:
    assert strategy.combine is not None
    wide = [Expression(_wide(term, place), place) for term in terms]
    combined: Any = strategy.combine(wide, [Expression(factor, place) for factor in factors])
    found: Node = combined.node
    return found


def _wide(node: Node, place: Node) -> Node:
    if value(node).dtype == torch.float32:
        return node
    with place.graph.inserting_before(place):
        return insert(place.graph, aten.to.dtype, (node, torch.float32), place)


def _shaped(graph: Graph, latent: Node, output: Node) -> Node:
    """Return ``latent`` with as many channels as ``output``: zeros where it predicts variances.

    Of a latent with conditioning channels, the first ones are what is denoised.
    """
    axis = 2 if value(output).dim() == 3 else 1
    has, wanted = value(latent).shape[axis], value(output).shape[axis]
    with graph.inserting_before(output):
        if has > wanted:
            return insert(graph, aten.slice.Tensor, (latent, axis, 0, wanted), output)
        if has < wanted:
            zeros = insert(graph, aten.mul.Tensor, (latent, 0.0), output)
            return insert(graph, aten.cat.default, ([latent, zeros], axis), output)
    return latent
