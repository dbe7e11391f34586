"""Estimate, before a search begins, how long it can take."""

from __future__ import annotations

from ditfastattn.runtime.search.judge.targets import TargetKind
from ditfastattn.runtime.search.measure.sensitivity import probe_steps
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.methods import Method
from ditfastattn.runtime.search.options import SearchOptions


def most_forwards(session: Session, options: SearchOptions, prompts: int, held_out: int) -> float:
    """Return the most dense forward passes, of one image, that the search can take."""
    steps, sites = session.steps, len(session.sites)
    costs = 30.0
    evaluation = float(prompts * steps)
    validation = 3.0 * held_out * steps
    if options.method is Method.GLOBAL:
        probes = probe_steps(steps)
        profiling = 1.25 * prompts * steps + len(probes) * sites / 2
        probing = sum(steps - step + 1 for step in probes)
        fixed, passes = profiling + probing, 0.0
    else:
        per_site = 2.0 if options.method is Method.GREEDY else 0.0
        fixed, passes = evaluation, prompts * steps * (2.0 + per_site * sites)
    if options.target.kind is TargetKind.QUALITY:
        return fixed + costs + options.max_rounds * (passes + evaluation) + validation
    return fixed + costs + passes
