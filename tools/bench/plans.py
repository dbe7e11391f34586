"""Our plans as methods of the benchmark: of sites, and of whole steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.reports import summary
from ditfastattn.runtime.search.candidates import Candidates
from ditfastattn.runtime.search.global_chooser import make_global
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.contender import Contender, planned_contender
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.options import SearchOptions
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.search import Search
from ditfastattn.runtime.search.speed_search import gentlest
from ditfastattn.runtime.search.whole_steps.calibrate import Options, prepare
from ditfastattn.runtime.search.whole_steps.search import WholeStepSearch
from ditfastattn.runtime.specializations import report_of
from ditfastattn.tools.bench.forms import Form
from ditfastattn.tools.bench.methods import Entry, lowering_of, whole_model
from ditfastattn.tools.bench.setup import BenchOptions, Data, Setup

OURS = "ditfastattn"
# A search weighs steps, and chooses between plans, by its target's metric; which bound it has does
# not matter here, since the strength of each plan is given.
BY_METRIC = {"SSIM": Target.min_ssim(0.9), "PSNR": Target.min_psnr(30.0)}

Named = Mapping[str, Plan]  # plans by their settings


@dataclass(frozen=True)
class Plans:
    """A method that is a plan per setting.

    Attributes:
        name: the name in records.
        find: makes the plans; the checkpoint keeps them.
    """

    name: str
    find: Callable[[Setup], Named]

    def entries(self, setup: Setup) -> Sequence[Entry]:
        """Return a setting per plan, without duplicates."""

        def make() -> Data:
            setup.tell(f"{self.name}: searching plans")
            return {name: plan.model_dump(mode="json") for name, plan in self.find(setup).items()}

        kept = setup.checkpoint.data(f"plans-{self.name}", make)
        plans = {name: Plan.parse(json.dumps(data)) for name, data in kept.items()}
        distinct = {plan.strategies: name for name, plan in reversed(plans.items())}
        return [
            _entry(setup, name, plan)
            for name, plan in plans.items()
            if distinct[plan.strategies] == name
        ]

    def form(self, setup: Setup, entries: Sequence[Entry]) -> tuple[Form, Data]:
        """Return the form."""
        return whole_model(setup), {}


def _entry(setup: Setup, name: str, plan: Plan) -> Entry:
    def contender(form: Form) -> Contender:
        return planned_contender(setup.pipeline, plan, setup.prompts, lowering_of(form))

    details = {
        "plan": summary(plan),
        "variants": len(set(plan.strategies)),
        "predicted_speedup": plan.calibration.predicted_speedup,
        "cache_bytes": plan.calibration.cache_bytes,
    }
    return Entry(name, contender, details, lambda: _flops_kept(plan))


def _flops_kept(plan: Plan) -> Data:
    """Return the fractions of a dense generation's FLOPs that ``plan``, which has run, keeps."""
    report = report_of(plan)
    if report is None or report.planned is None:  # the model is not captured
        return {}
    return {"attention_flops": report.attention_kept, "matrix_flops": report.matrix_kept}


def our_methods(options: BenchOptions) -> list[Plans]:
    """Return our plans, for each metric that a target may have."""
    kinds = {"sites": _sites} if options.speedups else {}
    kinds |= {"steps": _steps} if options.counts(options.work) else {}
    return [
        Plans(f"{OURS}-{kind}-{name.lower()}", find(by))
        for kind, find in kinds.items()
        for name, by in BY_METRIC.items()
    ]


def _sites(target: Target) -> Callable[[Setup], Named]:
    """Return what finds the gentlest plan of each predicted speedup."""

    def find(setup: Setup) -> Named:
        options = setup.options
        prompts = setup.model.calibration_prompts(options.steps)
        with open_session(setup.pipeline, prompts[0]) as session:
            work = Work(session, Checkpoint(), 0.0)
            chooser = make_global(work, prompts, target, Objective.LATENCY, options.max_variants)
            made = SearchOptions(target, max_variants=options.max_variants)
            search = Search(work, chooser, made, prompts, prompts)
            candidates = Candidates(chooser, options.max_variants > 0)
            found = {s: gentlest(candidates, session, s) for s in options.speedups}
            return {
                f"{speedup:g}x predicted": search.plan(item, 0.0)
                for speedup, item in found.items()
                if candidates.speedup(item.rows) >= speedup
            }

    return find


def _steps(target: Target) -> Callable[[Setup], Named]:
    def find(setup: Setup) -> Named:
        counts = setup.options.counts(setup.options.work)
        found = search_of(setup, target).curve(counts)
        return {f"{count} runs": plan for count, plan in found.items()}

    return find


def search_of(setup: Setup, target: Target) -> WholeStepSearch:
    """Return a search of whole steps on the model's calibration prompts."""
    prompts = setup.model.calibration_prompts(setup.options.steps)
    return whole_step_search(setup.pipeline, prompts, target)


def whole_step_search(
    pipeline: Any, prompts: Sequence[Prompt], target: Target, checkpoint: Checkpoint | None = None
) -> WholeStepSearch:
    """Return a search of whole steps on the calibration ``prompts``."""
    return prepare(pipeline, prompts, (), Options(target)).search(checkpoint or Checkpoint())
