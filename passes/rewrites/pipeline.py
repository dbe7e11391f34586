"""Run the passes that turn the dense graph into the graph of one step variant."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch.fx import GraphModule

from ditfastattn.core.env import Knobs, read_knobs
from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.analysis.sites import Site
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import clone, graph_text, outputs
from ditfastattn.passes.graph.verify import snapshot, verify
from ditfastattn.passes.plan.actions import SiteAction
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.rewrites.base import Pass
from ditfastattn.passes.rewrites.eliminate_dead_code import EliminateDeadCode
from ditfastattn.passes.rewrites.hoist_batch_slices import HoistBatchSlices
from ditfastattn.passes.rewrites.hoist_invariants import HOIST_PER_TIMESTEP, HoistInvariants
from ditfastattn.passes.rewrites.merge_heads import MergeHeads
from ditfastattn.passes.rewrites.narrow_caches import NarrowCaches
from ditfastattn.passes.rewrites.reuse_outputs import ReuseOutputs
from ditfastattn.passes.rewrites.share_guidance import ShareGuidance
from ditfastattn.passes.rewrites.store_caches import StoreCaches
from ditfastattn.passes.rewrites.window_residual import WindowResidual

log = logging.getLogger(__name__)


def variant_passes(
    sites: Sequence[Site],
    actions: Sequence[SiteAction],
    layout: CfgLayout,
    invariants: tuple[str, ...] = (),
    folded: tuple[str, ...] = (),
) -> tuple[Pass, ...]:
    """Return the passes of one step variant, in the order they run."""
    pairs = tuple(zip(sites, actions, strict=True))

    return (
        StoreCaches(
            outputs=tuple(site for site, action in pairs if action.writes_output),
            residuals=tuple(site for site, action in pairs if action.writes_residual),
        ),
        WindowResidual(tuple(site for site, action in pairs if action.strategy.windowed)),
        ReuseOutputs(
            tuple((site, act.strategy) for site, act in pairs if not act.strategy.computes)
        ),
        ShareGuidance(
            tuple(site for site, action in pairs if action.strategy.shares_guidance), layout
        ),
        MergeHeads(
            tuple((site, action.strategy) for site, action in pairs if site.whole is not None)
        ),
        NarrowCaches(tuple(sites)),
        HoistInvariants(invariants),
        HoistInvariants(folded, HOIST_PER_TIMESTEP),
        HoistBatchSlices(),
        EliminateDeadCode(),
    )


PASS_NAMES = tuple(step.name for step in variant_passes((), (), CfgLayout.NONE))


def rewrite(
    captured: CapturedGraph,
    sites: Sequence[Site],
    actions: Sequence[SiteAction],
    layout: CfgLayout,
    label: str = "variant",
    invariants: tuple[str, ...] = (),
    folded: tuple[str, ...] = (),
) -> GraphModule:
    """Return a new graph for one step variant; ``captured`` is left as it is.

    ``invariants`` and ``folded`` name the nodes that the variant is to read from a prologue: of the
    generation, and of the timestep.

    Raises:
        ConfigError: a knob names an unknown pass.
        VerifyError: a pass left the graph invalid.
    """
    knobs = read_knobs()
    _check_disabled(knobs)
    module = clone(captured.module)
    trusted = snapshot(module)  # the dense graph was verified when it was captured
    inputs, results = len(captured.inputs), len(outputs(captured.module.graph))
    done: list[str] = []
    _dump(knobs, label, 0, "dense", module)
    passes = variant_passes(sites, _fuelled(actions, knobs.fuel), layout, invariants, folded)
    for step in passes:
        if step.name in knobs.disabled:
            log.info("%s: %s: disabled", label, step.name)
            continue
        before = len(module.graph.nodes)
        result = step.run(module)
        done.append(step.name)
        if result.changed == 0 and len(module.graph.nodes) == before:
            continue
        log.info(
            "%s: %s: %d rewritten, %d declined",
            label,
            step.name,
            result.changed,
            len(result.declined),
        )
        for reason in result.declined:
            log.debug("%s: %s: declined: %s", label, step.name, reason)
        if knobs.verify:
            verify(module, inputs, results, ", ".join(done), trusted)
        _dump(knobs, label, len(done), step.name, module)
    module.recompile()
    return module


def _check_disabled(knobs: Knobs) -> None:
    unknown = sorted(set(knobs.disabled) - set(PASS_NAMES))
    if unknown:
        raise ConfigError(
            "unknown pass",
            where="DITFASTATTN_DISABLE",
            got=", ".join(unknown),
            expected=", ".join(PASS_NAMES),
        )


def _fuelled(actions: Sequence[SiteAction], fuel: int) -> tuple[SiteAction, ...]:
    """Let only the first ``fuel`` sites take their shortcut; negative means all."""
    if fuel < 0:
        return tuple(actions)
    kept: list[SiteAction] = []
    for action in actions:
        shortcut = action.strategy != Strategy.FULL
        kept.append(replace(action, strategy=Strategy.FULL) if shortcut and fuel == 0 else action)
        fuel -= shortcut and fuel > 0
    return tuple(kept)


def _dump(knobs: Knobs, label: str, position: int, name: str, module: GraphModule) -> None:
    if knobs.dump:
        path = Path(knobs.dump) / label / f"{position:02d}-{name}.txt"
        write_text_atomically(path, graph_text(module.graph) + "\n")
