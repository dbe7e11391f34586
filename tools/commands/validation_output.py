"""Show a validation: tables of quality, drift and speed, the verdict, and the same as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.reports import summary
from ditfastattn.runtime.search.judge.drift import decibels
from ditfastattn.runtime.search.judge.validate import Validation
from ditfastattn.runtime.search.measure.timing import PairedTiming
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import finite


def show_validation(console: Console, plan: Plan, found: Validation) -> None:
    """Print what was measured of ``plan``."""
    console.print(f"plan: {summary(plan)}", soft_wrap=True)
    console.print(quality_table(found))
    console.print(drift_table(found))
    console.print(found.drift.describe(), soft_wrap=True)
    if found.timing is None:
        console.print("speed was not measured")
    else:
        console.print(speed_table(found.timing, found.lowering))
    console.print(verdict(found), soft_wrap=True)


def quality_table(found: Validation) -> Table:
    """Return mean and worst of each metric, of the planned images against dense eager ones."""
    ran = "eager" if found.lowering is Lowering.EAGER else "compiled"
    table = Table(title=f"quality, {len(found.seeds)} prompts")
    table.add_column(f"planned {ran} against dense eager")
    table.add_column("mean", justify="right")
    table.add_column("worst", justify="right")
    for quality in found.qualities:
        unit = quality.unit
        table.add_row(quality.label, f"{quality.mean:.4g}{unit}", f"{quality.worst:.4g}{unit}")
    return table


def drift_table(found: Validation) -> Table:
    """Return the mean squared error of each way to generate, to dense eager images."""
    table = Table(title="drift to dense eager images, pixels in [0, 1]")
    for heading in ("", "mean squared error", "PSNR"):
        table.add_column(heading, justify="right" if heading else "left")
    drift = found.drift
    rows = {
        "compilation alone (dense compiled)": drift.compilation,
        "plan alone (planned eager)": drift.plan,
        "both (planned compiled)": drift.both,
    }
    for label, error in rows.items():
        if error is None:
            table.add_row(label, "not measured", "")
        else:
            table.add_row(label, f"{error:.3g}", f"{decibels(error):.1f} dB")
    return table


def speed_table(timing: PairedTiming, lowering: Lowering) -> Table:
    """Return seconds per generation and the speedup of each pair."""
    compiled = lowering is Lowering.INDUCTOR
    table = Table(title="speed, both compiled" if compiled else "speed, nothing compiled")
    for heading in ("", "median", "quartiles"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {
        "dense, seconds per generation": (timing.baseline, "", 3),
        "planned, seconds per generation": (timing.candidate, "", 3),
        "speedup": (timing.speedup, "x", 2),
    }
    for label, (part, unit, places) in rows.items():
        middle, low, high = (
            f"{number:.{places}f}{unit}"
            for number in (part.median, part.lower_quartile, part.upper_quartile)
        )
        table.add_row(label, middle, f"{low} to {high}")
    table.caption = f"{len(timing.speedup.samples)} pairs"
    return table


def verdict(found: Validation) -> str:
    """Return a sentence: which target, and whether it is met."""
    if found.target is None:
        return "target: the plan records none: nothing to check"
    described = found.target.describe()
    if found.met is None:
        return f"target: {described}: nothing to check on images"
    return f"target: {described}: {'met' if found.met else 'missed'} ({found.reached:.4g})"


def validation_json(plan: Plan, found: Validation) -> dict[str, Any]:
    """Return the measurements as JSON data; an infinite number is its name."""
    target = found.target
    data = {
        "machine": machine(),
        "plan": summary(plan),
        "sampler": plan.sampler.model_dump(include={"scheduler", "steps", "guidance_scale"}),
        "target": target
        and {"name": target.name, "bound": target.bound, "at_least": target.at_least},
        "met": found.met,
        "reached": found.reached,
        "lowering": found.lowering,
        "seeds": found.seeds,
        "qualities": [
            {**asdict(quality), "mean": quality.mean, "worst": quality.worst}
            for quality in found.qualities
        ],
        "drift": {
            **asdict(found.drift),
            "plan_share": found.drift.plan_share,
            "summary": found.drift.describe(),
        },
        "timing": found.timing and asdict(found.timing),
    }
    written: dict[str, Any] = finite(data)
    return written
