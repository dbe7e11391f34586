"""Run the passes that turn the dense graph into the graph of one step variant."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch.fx import GraphModule

from ditfastattn.core.env import Knobs, read_knobs
from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import clone, graph_text, outputs
from ditfastattn.passes.graph.verify import Verifier
from ditfastattn.passes.plan.actions import SiteAction
from ditfastattn.passes.plan.guidance import CfgLayout, GuidanceCall
from ditfastattn.passes.plan.step_program import StepProgram, unroll
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.rewrites.base import Pass, PassResult
from ditfastattn.passes.rewrites.eliminate_dead_code import EliminateDeadCode
from ditfastattn.passes.rewrites.fit_outputs import FitOutputs
from ditfastattn.passes.rewrites.hoist_batch_slices import HoistBatchSlices
from ditfastattn.passes.rewrites.hoist_invariants import HoistInvariants
from ditfastattn.passes.rewrites.merge_heads import MergeHeads
from ditfastattn.passes.rewrites.narrow_caches import NarrowCaches
from ditfastattn.passes.rewrites.reuse_outputs import ReuseOutputs
from ditfastattn.passes.rewrites.share_guidance import ShareGuidance
from ditfastattn.passes.rewrites.store_caches import StoreCaches
from ditfastattn.passes.rewrites.switches import Switches, switched_off
from ditfastattn.passes.rewrites.window_residual import WindowResidual

log = logging.getLogger(__name__)


def variant_passes(
    sites: Sequence[Site],
    actions: Sequence[SiteAction],
    layout: CfgLayout,
    per_generation: tuple[str, ...] = (),
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
            tuple(
                (site, act.strategy)
                for site, act in pairs
                if not act.strategy.computes and not act.strategy.fitted
            )
        ),
        FitOutputs(
            tuple((site, act.strategy) for site, act in pairs if act.strategy.fitted), layout
        ),
        ShareGuidance(
            tuple(site for site, action in pairs if action.strategy.shares_guidance), layout
        ),
        MergeHeads(
            tuple((site, action.strategy) for site, action in pairs if site.whole is not None)
        ),
        NarrowCaches(tuple(sites)),
        HoistInvariants(per_generation),
        HoistBatchSlices(),
        EliminateDeadCode(),
    )


DENSE = "dense"  # the graph before the first pass
Watch = Callable[[str, GraphModule], None]


def _ignore(_name: str, _module: GraphModule) -> None:
    pass


PASS_NAMES = tuple(step.name for step in variant_passes((), (), CfgLayout.NONE))


def rewrite(
    captured: CapturedGraph,
    sites: Sequence[Site],
    actions: Sequence[SiteAction],
    layout: CfgLayout,
    label: str = "variant",
    per_generation: tuple[str, ...] = (),
    watch: Watch = _ignore,
) -> GraphModule:
    """Return a new graph for one step variant; ``captured`` is left as it is.

    ``per_generation`` names the nodes whose hoisted values the variant reads. ``watch`` is shown
    the dense graph, and the graph after each pass that changed it, by the pass's name.

    Raises:
        ConfigError: a knob names an unknown pass.
        VerifyError: a pass left the graph invalid.
    """
    knobs = read_knobs()
    off = switches(knobs).off
    module = clone(captured.module)
    inputs, results = len(captured.inputs), len(outputs(captured.module.graph))
    verifier = Verifier(module, inputs, results)  # the dense graph was verified at its capture
    done: list[str] = []
    _dump(knobs, label, 0, DENSE, module)
    watch(DENSE, module)
    passes = variant_passes(sites, _fuelled(actions, knobs.fuel), layout, per_generation)
    for step in passes:
        if step.name in off:
            log.info("%s: %s: off: %s", label, step.name, off[step.name])
            continue
        result = step.run(module)
        done.append(step.name)
        _log(label, step.name, result)
        if knobs.verify:
            verifier.check_report(result.changed, ", ".join(done))
        if result.changed:
            _dump(knobs, label, len(done), step.name, module)
            watch(step.name, module)
    module.recompile()
    return module


def unroll_available(
    rows: Sequence[Sequence[Strategy]],
    captured: CapturedGraph,
    sites: Sequence[Site],
    merge_variants: bool = False,
    call: GuidanceCall = GuidanceCall.ONLY,
) -> StepProgram:
    """Return the step program of what is left of ``rows`` where passes are switched off."""
    available = switches()
    left = available.plan(rows, two_calls=call is not GuidanceCall.ONLY)
    return unroll(left, captured, available.sites(sites), merge_variants, call)


def switches(knobs: Knobs | None = None) -> Switches:
    """Return which passes the knobs switch off.

    Raises:
        ConfigError: a knob is not valid, or names an unknown pass.
    """
    passes = variant_passes((), (), CfgLayout.NONE)
    return switched_off(passes, (knobs or read_knobs()).disabled)


def _log(label: str, name: str, result: PassResult) -> None:
    changed, declined = result.changed, len(result.declined)
    if changed or declined:
        log.info("%s: %s: %d rewritten, %d declined", label, name, changed, declined)
    for reason in result.declined:
        log.debug("%s: %s: declined: %s", label, name, reason)


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
