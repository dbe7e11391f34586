"""``ditfastattn inspect --graph``: a step's graph before and after each pass."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.guidance import calls_of
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.rewrites.pipeline import rewrite, unroll_available
from ditfastattn.runtime.matching import planned_sites
from ditfastattn.runtime.pipeline.prompts import split_prompts
from ditfastattn.runtime.pipeline.text_padding import text_padded
from ditfastattn.runtime.search.judge.validate import planned_call
from ditfastattn.runtime.search.measure.call_log import searched_phases
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.tools.graph_view import GraphView, changes, view, write_views
from ditfastattn.tools.terminal import spinner


def write_graphs(
    console: Console, pipeline: Any, plan: Plan, call: dict[str, Any], step: int, folder: Path
) -> list[dict[str, str]]:
    """Rewrite the graph of ``step`` and write what each pass makes of it to ``folder``.

    Return, for each pass that changed it, its name and which operators it added and removed. Where
    guidance takes two calls a step, the first one is shown.

    Raises:
        ConfigError: the plan has no such step, or is for another model.
    """
    steps = plan.sampler.steps
    if not 0 <= step < steps:
        raise ConfigError(
            "the plan has no such step", where="--step", got=step, expected=f"0 to {steps - 1}"
        )
    groups, spans = plan.head_groups or 1, plan.sampler.spans
    number = next(n for n, (phase, _) in enumerate(spans) if step in phase)
    only = searched_phases(spans)[number] if plan.sampler.phases else None
    (phase, layout), here = spans[number], slice(spans[number][0].start, spans[number][0].stop)
    prompt = split_prompts(planned_call(pipeline, plan, call), 0)[0]
    views: list[GraphView] = []
    with (
        spinner(console, "capturing and rewriting"),
        text_padded(pipeline, plan.text),
        open_session(pipeline, prompt, layout, head_groups=groups, only=only) as session,
    ):
        captured = session.captured
        sites = [
            replace(site, coefficients=site.coefficients[here])
            for site in planned_sites(plan, captured, session.sites, session.identity)
        ]
        rows, first = plan.strategies[here], calls_of(layout)[0]
        program = unroll_available(rows, captured, sites, plan.merge_variants, first)
        actions = program.variants[program.schedule[step - phase.start]]
        rewrite(
            captured,
            program.sites,
            actions,
            layout,
            f"step-{step}",
            watch=lambda name, module: views.append(view(name, module)),
        )
    write_views(views, folder)
    pairs = itertools.pairwise(views)
    found = [{"pass": after.name, "changes": changes(before, after)} for before, after in pairs]
    console.print(f"step {step}, by {len(found)} passes that change it:")
    for each in found:
        console.print(f"{each['pass']}: {each['changes']}", soft_wrap=True)
    console.print(f"wrote {folder}: each graph as text and as SVG", soft_wrap=True)
    return found
