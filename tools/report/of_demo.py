"""The report of a demo."""

from __future__ import annotations

from ditfastattn.tools.demo.result import DemoResult, PlanOutcome
from ditfastattn.tools.measure import machine
from ditfastattn.tools.report.content import (
    PlanSection,
    Points,
    Report,
    declined_of,
    pictures,
    plan_facts,
)
from ditfastattn.tools.terminal import duration


def demo_report(result: DemoResult, peers: Points) -> Report:
    """Return the report of ``result``; its chart shows the ``peers`` as well."""
    outcomes = result.outcomes
    headings = ("", "dense", *(outcome.name for outcome in outcomes))
    dense = outcomes[0].timing.baseline.median
    rows = (
        ("speedup", "1.00x", *(f"{o.timing.speedup.median:.2f}x" for o in outcomes)),
        (
            "seconds per generation",
            f"{dense:.2f}",
            *(f"{o.timing.candidate.median:.2f}" for o in outcomes),
        ),
        ("all matrix FLOPs kept", "100%", *(f"{o.flops_kept:.0%}" for o in outcomes)),
        ("attention FLOPs kept", "100%", *(f"{o.attention_kept:.0%}" for o in outcomes)),
        ("SSIM to dense, mean", "1", *(f"{o.quality.ssim:.3f}" for o in outcomes)),
        ("SSIM to dense, worst", "1", *(f"{o.quality.worst_ssim:.3f}" for o in outcomes)),
        ("PSNR to dense", "", *(f"{o.quality.psnr:.1f} dB" for o in outcomes)),
        (result.obeyed, f"{result.dense_obeyed:.0%}", *(f"{o.obeyed:.0%}" for o in outcomes)),
        (
            "peak cache, MiB",
            "0",
            *(f"{o.report.peak_cache_bytes / 2**20:.1f}" for o in outcomes),
        ),
        (
            "seconds to compile",
            f"{result.compile_seconds:.0f}",
            *(f"{o.compile_seconds:.0f}" for o in outcomes),
        ),
    )
    images = outcomes[0].quality.images
    return Report(
        title=f"ditfastattn demo: {result.model}",
        facts=(
            ("images", f"{images}, each generated and timed once by each model"),
            ("whole demo", duration(result.seconds)),
        ),
        tables={"Dense and planned, all compiled, same seeds": (headings, *rows)},
        sections=tuple(_section(result, outcome) for outcome in outcomes),
        frontier={
            result.model: [
                (1.0, 1.0, "dense"),
                *((o.timing.speedup.median, o.quality.ssim, o.name) for o in outcomes),
            ],
            **peers,
        },
        quality="mean SSIM to dense",
        environment=machine(),
    )


def _section(result: DemoResult, outcome: PlanOutcome) -> PlanSection:
    return PlanSection(
        name=outcome.name,
        plan=outcome.plan,
        facts=plan_facts(outcome.plan),
        prices=outcome.given.prices,
        errors=outcome.given.errors,
        caches=outcome.report.caches,
        declined=declined_of(outcome.report.sites, outcome.plan),
        pictures=pictures(result.dense_images, outcome.images),
    )
