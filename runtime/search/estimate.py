"""Estimate, before a search begins, how long it takes, and how long it can take."""

from __future__ import annotations

from ditfastattn.runtime.search.global_chooser import PROFILED
from ditfastattn.runtime.search.judge.targets import TargetKind
from ditfastattn.runtime.search.measure.sensitivity import probe_steps
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.methods import Method
from ditfastattn.runtime.search.options import SearchOptions

_COSTS = 30.0  # pricing each strategy
_ROUNDS = 3.0  # that a search usually takes to meet a quality
_KEPT = 0.4  # of a dense generation, by a plan that is worth having


def usual_forwards(session: Session, options: SearchOptions, prompts: int, held_out: int) -> float:
    """Return about how many dense forward passes, of one image, the search takes."""
    steps, passes = session.steps, _passes(session, options, prompts)
    if options.target.kind is not TargetKind.QUALITY:
        return _fixed(session, options, min(prompts, PROFILED)) + _COSTS + passes
    dense = (max(0, prompts - PROFILED) + held_out) * steps
    planned = _KEPT * steps * (_ROUNDS * prompts + held_out)
    fixed = _fixed(session, options, min(prompts, PROFILED))
    return fixed + _COSTS + dense + planned + _ROUNDS * passes


def most_forwards(session: Session, options: SearchOptions, prompts: int, held_out: int) -> float:
    """Return the most dense forward passes, of one image, that the search can take."""
    steps, passes = session.steps, _passes(session, options, prompts)
    fixed = _fixed(session, options, prompts) + _COSTS
    if options.target.kind is not TargetKind.QUALITY:
        return fixed + passes
    validation = 3.0 * held_out * steps
    return fixed + options.max_rounds * (passes + float(prompts * steps)) + validation


def _fixed(session: Session, options: SearchOptions, profiled: int) -> float:
    """Return the forward passes before the first plan: profiling, and probing."""
    steps, sites = session.steps, len(session.sites)
    if options.method is not Method.GLOBAL:
        return float(profiled * steps)
    probes = probe_steps(steps)
    profiling = 1.25 * profiled * steps + len(probes) * sites / 2
    return profiling + sum(steps - step + 1 for step in probes)


def _passes(session: Session, options: SearchOptions, prompts: int) -> float:
    """Return the forward passes of what makes a plan: a progressive pass, or none."""
    if options.method is Method.GLOBAL:
        return 0.0
    per_site = 2.0 if options.method is Method.GREEDY else 0.0
    return prompts * session.steps * (2.0 + per_site * len(session.sites))
