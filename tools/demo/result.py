"""What the demo found: tables for the terminal, and the same as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.reports import RunReport, summary
from ditfastattn.runtime.search.judge.metrics import image_psnr, image_ssim
from ditfastattn.runtime.search.measure.timing import PairedTiming
from ditfastattn.tools.demo.plans import DemoPlan, Phases
from ditfastattn.tools.measure import machine
from ditfastattn.tools.savings import Saving, savings


@dataclass(frozen=True)
class Quality:
    """How close planned images are to dense ones; PSNR in dB."""

    images: int
    psnr: float
    ssim: float
    worst_ssim: float


@dataclass(frozen=True)
class PlanOutcome:
    """What the demo measured of one plan; ``obeyed`` is the share of images as asked for."""

    given: DemoPlan
    report: RunReport
    timing: PairedTiming
    quality: Quality
    obeyed: float
    compile_seconds: float
    images: Tensor

    @property
    def name(self) -> str:
        """Return the plan's name."""
        return self.given.name

    @property
    def plan(self) -> Plan:
        """Return the plan."""
        return self.given.plan

    @property
    def attention_kept(self) -> float:
        """Return the fraction of attention FLOPs that the plan keeps."""
        kept = self.report.attention_kept
        return 1.0 if kept is None else kept

    @property
    def flops_kept(self) -> float:
        """Return the fraction of all matrix-product FLOPs that the plan keeps."""
        kept = self.report.matrix_kept
        return 1.0 if kept is None else kept

    @property
    def saved(self) -> tuple[list[Saving], list[Saving]]:
        """Return what each kind of shortcut saves: of operations, and of seconds as priced."""
        assert self.given.prices is not None
        flops, seconds = self.given.prices
        return savings(self.plan, flops), savings(self.plan, seconds)


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo's tables show."""

    model: str
    obeyed: str
    outcomes: tuple[PlanOutcome, ...]
    dense_images: Tensor
    dense_obeyed: float
    compile_seconds: float
    phases: Phases
    seconds: float


def compare_images(dense: Tensor, planned: Tensor) -> Quality:
    """Return how close ``planned`` is to ``dense``; both ``[B, C, H, W]`` in [0, 1]."""
    ssim, psnr = image_ssim(dense, planned), image_psnr(dense, planned)
    return Quality(len(dense), float(psnr.mean()), float(ssim.mean()), float(ssim.min()))


def result_table(result: DemoResult) -> Table:
    """Return a column for the dense model and for each plan."""
    outcomes = result.outcomes
    table = Table(title="dense and planned, all compiled, same seeds")
    for heading in ("", "dense", *(outcome.name for outcome in outcomes)):
        table.add_column(heading, justify="right" if heading else "left")

    def row(label: str, dense: str, planned: Callable[[PlanOutcome], str | Text]) -> None:
        table.add_row(label, dense, *(planned(outcome) for outcome in outcomes))

    row("asked for", "", lambda o: _target(o.plan))
    row("attention FLOPs kept", "100%", lambda o: f"{o.attention_kept:.0%}")
    row("all matrix FLOPs kept", "100%", lambda o: f"{o.flops_kept:.0%}")
    dense_seconds = outcomes[0].timing.baseline.median
    row("seconds per generation", f"{dense_seconds:.2f}", lambda o: f"{_seconds(o):.2f}")
    row("speedup, median of pairs", "", lambda o: Text(f"{o.timing.speedup.median:.2f}x", "bold"))
    row("PSNR to dense", "", lambda o: f"{o.quality.psnr:.1f} dB")
    row("SSIM to dense, mean", "", lambda o: Text(f"{o.quality.ssim:.3f}", "bold"))
    row("  worst image", "", lambda o: f"{o.quality.worst_ssim:.3f}")
    row(result.obeyed, f"{result.dense_obeyed:.0%}", lambda o: f"{o.obeyed:.0%}")
    row("peak cache, MiB", "0", lambda o: f"{o.report.peak_cache_bytes / 2**20:.1f}")
    row("step variants", "1", lambda o: str(o.report.variants))
    row("seconds to compile", f"{result.compile_seconds:.0f}", lambda o: f"{o.compile_seconds:.0f}")
    table.caption = f"{outcomes[0].quality.images} images, each generated and timed once by each"
    return table


def savings_table(result: DemoResult) -> Table:
    """Return a row per kind of shortcut: how often each plan takes it, and what it saves."""
    table = Table(title="what each plan takes, and what that saves")
    table.add_column("")
    for outcome in result.outcomes:
        table.add_column(outcome.name, justify="right")
    rows = [list(zip(*outcome.saved, strict=True)) for outcome in result.outcomes]
    for parts in zip(*rows, strict=True):
        flops, _ = parts[0]
        table.add_row(str(flops.shortcut), *(_saving(counted, timed) for counted, timed in parts))
    table.caption = "entries of the plan: share of dense matrix FLOPs / of dense seconds, as priced"
    return table


def _saving(counted: Saving, timed: Saving) -> str:
    if not counted.entries:
        return "none"
    return f"{counted.entries}: {counted.share:.0%} / {timed.share:.0%}"


def _seconds(outcome: PlanOutcome) -> float:
    return outcome.timing.candidate.median


def _target(plan: Plan) -> str:
    target = plan.calibration.target
    if target is None:
        return ""
    return f"{target.name} {'>=' if target.at_least else '<='} {target.bound:g}"


def demo_json(result: DemoResult) -> dict[str, Any]:
    """Return the measurements as JSON data; plans have files of their own."""
    return {
        "machine": machine(),
        "model": result.model,
        "seconds": result.seconds,
        "phases": result.phases.model_dump(),
        "dense": {
            "compile_seconds": result.compile_seconds,
            "obeyed": result.dense_obeyed,
        },
        "plans": {outcome.name: _outcome_json(outcome) for outcome in result.outcomes},
    }


def _outcome_json(outcome: PlanOutcome) -> dict[str, Any]:
    plan = outcome.plan
    counted, timed = outcome.saved
    return {
        "plan": summary(plan),
        "sampler": plan.sampler.model_dump(include={"scheduler", "steps", "guidance_scale"}),
        "calibration": plan.calibration.model_dump(),
        "attention_flops_kept": outcome.attention_kept,
        "matrix_flops_kept": outcome.flops_kept,
        "variants": outcome.report.variants,
        "peak_cache_bytes": outcome.report.peak_cache_bytes,
        "compile_seconds": outcome.compile_seconds,
        "quality": asdict(outcome.quality),
        "obeyed": outcome.obeyed,
        "timing": asdict(outcome.timing),
        "saved": {
            flops.shortcut: {
                "entries": flops.entries,
                "share_of_flops": flops.share,
                "share_of_seconds": seconds.share,
            }
            for flops, seconds in zip(counted, timed, strict=True)
        },
    }
