"""Find our plans for the benchmark: one per drift budget and per fraction of attention FLOPs."""

from __future__ import annotations

import json

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.search.candidates import Found
from ditfastattn.runtime.search.global_chooser import GlobalChooser, make_global
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.options import SearchOptions
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.search import Search
from ditfastattn.runtime.specializations import reports
from ditfastattn.tools.bench.setup import Data, Setup

_BISECTIONS = 16


def find_plans(setup: Setup) -> list[Plan]:
    """Return the plans, without duplicates; the checkpoint keeps them, and resumes a search."""
    options, checkpoint = setup.options, setup.checkpoint
    names = [f"plan-{budget:g}" for budget in options.budgets]
    names += [f"plan-attention-{fraction:g}" for fraction in options.fractions]
    kept = [checkpoint.peek(name) for name in names]
    if None in kept:
        kept = _searched(setup)
        for name, data in zip(names, kept, strict=True):
            checkpoint.put(name, data)
    plans = [Plan.parse(json.dumps(data)) for data in kept]
    return list({plan.strategies: plan for plan in plans}.values())


def _searched(setup: Setup) -> list[Data]:
    options = setup.options
    setup.tell("profiling, for our plans")
    prompts = setup.model.calibration_prompts(options.steps)
    target = Target.min_ssim(0.9)  # its metric weighs the steps; the budgets set the strength
    with open_session(setup.pipeline, prompts[0]) as session:
        work = Work(session, setup.checkpoint, 0.0)
        chooser = make_global(work, prompts, target, Objective.LATENCY, options.max_variants)
        made = SearchOptions(target, max_variants=options.max_variants)
        search = Search(work, chooser, made, prompts, prompts)
        found = [Found(chooser.rows(budget), budget) for budget in options.budgets]
        found += [_keeping(chooser, work, fraction) for fraction in options.fractions]
        return [search.plan(item, 0.0).model_dump(mode="json") for item in found]


def _keeping(chooser: GlobalChooser, work: Work, fraction: float) -> Found:
    """Return the gentlest plan found that keeps at most ``fraction`` of the attention FLOPs."""
    merged = chooser.most > 0
    full = [(Strategy.FULL,) * len(work.session.sites)] * work.session.steps
    dense = work.variants.flops(full, merged).attention
    low, high = 0.0, chooser.first or 1.0
    best: Found | None = None
    for _ in range(_BISECTIONS):
        strength = high if best is None else (low + high) / 2
        rows = chooser.rows(strength)
        if work.variants.flops(rows, merged).attention <= fraction * dense:
            best, high = Found(rows, strength), strength
        else:
            low, high = strength, (2 * high if best is None else high)
    if best is None:
        raise ConfigError(
            "no plan keeps so little of the attention",
            where="--fractions",
            got=fraction,
            remedy="ask for more steps, or keep more",
        )
    return best


def flops_kept(plan: Plan) -> Data:
    """Return the fractions of a dense generation's FLOPs that ``plan``, which has run, keeps."""
    report = next(report for report in reports() if report.plan == plan)
    assert report.planned is not None
    return {
        "attention_flops": report.planned.attention / report.dense.attention,
        "matrix_flops": report.planned.total / report.dense.total,
    }
