"""Capture a pipeline's transformer as one graph, with the sites that a plan may change."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.fingerprint import Fingerprint, fingerprint
from ditfastattn.passes.analysis.site import Site, attentions
from ditfastattn.passes.analysis.sites import SiteReport, find_sites
from ditfastattn.passes.capture.captured_graph import CapturedGraph, GraphInput
from ditfastattn.passes.capture.dynamo import capture
from ditfastattn.passes.capture.plain_tensors import plain_tensors
from ditfastattn.passes.graph.ir import outputs
from ditfastattn.passes.graph.verify import verify
from ditfastattn.passes.rewrites.split_heads import Groups, groups_of, split_heads
from ditfastattn.runtime.matching import static_tensors, timestep_position

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CapturedModel:
    """Hold the graph of one step, its sites, and the flat inputs of its first call.

    ``timestep`` is the position of the timestep among the flat inputs.
    """

    captured: CapturedGraph
    sites: tuple[Site, ...]
    identity: Fingerprint
    timestep: int
    example: tuple[Tensor, ...]


@dataclass(frozen=True)
class ModelOptions:
    """Say which sites a session has: ``head_groups`` splits heads, see ``open_session``."""

    timestep: str
    attention_only: bool
    head_groups: int | Groups

    def sites_of(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """Return those of ``sites`` that a plan may change."""
        return attentions(sites) if self.attention_only else tuple(sites)


def capture_model(
    module: GraphModule,
    inputs: tuple[GraphInput, ...],
    args: Sequence[Any],
    options: ModelOptions,
) -> CapturedModel:
    """Capture the graph ``module`` of a call with ``args``, as Dynamo found it.

    Raises:
        ConfigError: as ``model_of``.
    """
    return model_of(capture(module, inputs, args), plain_tensors(args), options)


def model_of(
    captured: CapturedGraph, given: Sequence[Tensor], options: ModelOptions
) -> CapturedModel:
    """Return the model that is ``captured``, of a call with the flat inputs ``given``.

    Raises:
        ConfigError: the model has no attention to plan, or none that can be split as asked.
    """
    verify(captured.module, len(captured.inputs), len(outputs(captured.module.graph)), "capture")
    report = find_sites(captured)
    if not options.sites_of(report.sites):
        raise _no_attention(report)
    tensors = tuple(given)
    identity = fingerprint(captured, report.sites, static_tensors(captured, tensors))
    position = timestep_position(captured, options.timestep)
    split = _split(captured, report.sites, options.head_groups)
    found = report.sites if split is captured else find_sites(split).sites
    return CapturedModel(split, options.sites_of(found), identity, position, tensors)


def _no_attention(report: SiteReport) -> ConfigError:
    reasons = "; ".join(f"{item.name}: {item.reason}" for item in report.declined)
    return ConfigError(
        "there is no attention to plan",
        where="the transformer's graph",
        got=f"{len(report.declined)} attention nodes, each declined",
        remedy=reasons or "the model must call scaled_dot_product_attention",
    )


def _split(captured: CapturedGraph, sites: Sequence[Site], wanted: int | Groups) -> CapturedGraph:
    """Split the heads of ``captured`` as asked; report what cannot be split."""
    groups = groups_of(sites, wanted) if isinstance(wanted, int) else wanted
    split = split_heads(captured, sites, groups)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in split.declined.items())
    if reasons and isinstance(wanted, int) and split.captured is captured:
        raise ConfigError(
            "no attention can be split by heads",
            where="calibrate(head_groups)",
            got=wanted,
            remedy=f"leave head_groups at 1: {reasons}",
        )
    if reasons:
        log.warning("ditfastattn: the heads of some sites stay together: %s", reasons)
    return split.captured
