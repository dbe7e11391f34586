"""Measure the caches of a plan of the demo: the prediction, and the growth of the process.

    python -m ditfastattn.tools.benchmark_memory --out benchmarks/memory

The growth is Linux's count of the process's memory, read as each step hands over what it has
written and still holds what it replaces; the largest is compared with the prediction. Each plan
runs in its own process.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer

from ditfastattn import reports
from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.step_program import unroll
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.caches import Caches
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.measure.contender import planned_contender
from ditfastattn.runtime.search.measure.session import Session, open_session
from ditfastattn.tools.bench.models import DIGITS
from ditfastattn.tools.benchmarking.process import run_alone
from ditfastattn.tools.measure import machine, process_memory, trim_memory
from ditfastattn.tools.terminal import open_console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("benchmarks/memory"),
    plan: Annotated[list[Path], typer.Option(help="Plans of the demo.")] = [  # noqa: B006  # typer
        Path("benchmarks/demo/plan.json")
    ],
) -> None:
    """Measure each plan, and its attention alone, beside all outputs and residuals."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for path in plan:
            loaded = Plan.load(path)
            alone = Path(folder) / f"{len(found)}.json"
            _attention_alone(loaded).save(alone)
            found[str(path)] = _weighed(path, loaded)
            found[f"{path}, attention alone"] = _weighed(alone, Plan.load(alone))
    write_text_atomically(
        out / "memory.json", json.dumps({"machine": machine(), "plans": found}, indent=1) + "\n"
    )
    open_console().print_json(data=found)


def _weighed(path: Path, plan: Plan) -> dict[str, Any]:
    """Count what ``plan`` keeps, and measure it in its own process."""
    pipeline = DIGITS.open()
    with open_session(pipeline, Prompt({**DIGITS.call(0), "num_inference_steps": 2}, 0)) as session:
        counted = _cache_bytes(session, plan.strategies)
    measured: dict[str, int] = run_alone("benchmark_memory", "weigh", str(path))
    ratio = measured["process_growth"] / measured["predicted_peak"]
    return {**counted, **measured, "growth_over_prediction": ratio}


@app.command(hidden=True)
def weigh(path: Path) -> None:
    """Print the peak memory of a warm generation of the demo, and the prediction."""
    plan, pipeline = Plan.load(path), DIGITS.open()
    prompt = Prompt({**DIGITS.call(3), "num_inference_steps": plan.sampler.steps}, 0)
    contender = planned_contender(pipeline, plan, [prompt], Lowering.INDUCTOR)
    contender.warm_up()
    (report,) = reports()
    write, seen = Caches.write, list[int]()

    def noting(caches: Caches, *arguments: Any) -> None:
        trim_memory()
        seen.append(process_memory())
        write(caches, *arguments)

    trim_memory()
    before = process_memory()
    with patch.object(Caches, "write", noting):
        contender.generate(0)
    found = {
        "predicted_peak": report.peak_cache_bytes,
        "computed_ahead": report.ahead_bytes,
        "process_growth": max(seen) - before,
    }
    print(json.dumps(found))


def _attention_alone(plan: Plan) -> Plan:
    kept = [site.kind is not SiteKind.FEED_FORWARD for site in plan.sites]
    rows = tuple(
        tuple(s if keep else Strategy.FULL for s, keep in zip(row, kept, strict=True))
        for row in plan.strategies
    )
    return plan.model_copy(update={"strategies": rows})


def _cache_bytes(session: Session, rows: Sequence[Sequence[Strategy]]) -> dict[str, int]:
    program = unroll(rows, session.captured, session.sites)
    slots = {each.slot: each.bytes for each in program.slots.slots}
    return {
        "slots_of_the_plan_all_kept": sum(slots.values()),
        "outputs_and_residuals_of_all_sites": _everything(session),
    }


def _everything(session: Session) -> int:
    """Return the bytes of each site's output, and of each attention's residual."""
    total = 0
    for site in session.sites:
        total += _once(session, site, Strategy.SHARE_STEP)
        if not why_not(Strategy.WINDOW, site):
            total += _once(session, site, Strategy.WINDOW)
    return total


def _once(session: Session, site: Site, strategy: Strategy) -> int:
    program = unroll([[Strategy.FULL], [strategy]], session.captured, [site])
    return sum(slot.bytes for slot in program.slots.slots)


if __name__ == "__main__":
    app()
