"""The main job on the embedded model: calibrate, compile dense and planned, compare."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import ditfastattn
from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.reports import RunReport, summary
from ditfastattn.runtime.search.judge.metrics import image_psnr, image_ssim
from ditfastattn.runtime.search.measure.contender import dense_contender, planned_contender
from ditfastattn.runtime.search.measure.timing import PairedTiming, measure_pairs
from ditfastattn.tools.commands.search_output import print_outcome, search_progress
from ditfastattn.tools.digits_data import NUM_CLASSES, class_accuracy
from ditfastattn.tools.digits_pipeline import DigitsPipeline, embedded_pipeline
from ditfastattn.tools.figures import image_grid, plan_map
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import open_console, spinner

CALIBRATION_CLASSES = (0, 3, 5, 8)
HELD_OUT_CLASSES = (1, 4, 6, 9)
FIRST_TEST_SEED = 1000  # the search uses seeds from 0 and 500: it has seen no test image
GRID_IMAGES = 10


@dataclass(frozen=True)
class Quality:
    """How close planned images are to dense ones; PSNR in dB."""

    images: int
    psnr: float
    ssim: float
    worst_ssim: float
    dense_accuracy: float
    planned_accuracy: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo's table shows."""

    plan: Plan
    report: RunReport
    timing: PairedTiming
    quality: Quality
    compile_seconds: tuple[float, float]

    @property
    def attention_kept(self) -> float:
        """Return the fraction of attention FLOPs that the plan keeps."""
        planned = self.report.planned
        return 1.0 if planned is None else planned.attention / self.report.dense.attention

    @property
    def flops_kept(self) -> float:
        """Return the fraction of all matrix-product FLOPs that the plan keeps."""
        planned = self.report.planned
        return 1.0 if planned is None else planned.total / self.report.dense.total


def run_demo(
    out: Path, steps: int, guidance_scale: float, min_ssim: float, repetitions: int, seed: int
) -> DemoResult:
    """Run the demo, print its table, and write plan, images and measurements to ``out``."""
    console = open_console()
    out.mkdir(parents=True, exist_ok=True)
    call = {"guidance_scale": guidance_scale, "num_inference_steps": steps}
    pipeline = embedded_pipeline()
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    with search_progress(console) as show:
        plan = ditfastattn.calibrate(
            pipeline,
            {"class_labels": list(CALIBRATION_CLASSES), **call},
            target=ditfastattn.Target.min_ssim(min_ssim),
            held_out={"class_labels": list(HELD_OUT_CLASSES), **call},
            cache_dtype="float16",
            seed=seed,
            out=out / "plan.json",  # an interrupted demo resumes its search
            on_progress=show,
        )
    print_outcome(console, plan)
    result, dense, planned = _compare(console, pipeline, plan, call, repetitions)
    image_grid(dense[:GRID_IMAGES], planned[:GRID_IMAGES], out / "images.png")
    plan_map(plan, out / "plan.png", result.attention_kept)
    write_text_atomically(out / "result.json", json.dumps(as_json(result), indent=1) + "\n")
    console.print(result_table(result))
    console.print(f"wrote plan.json, result.json, images.png and plan.png to {out}")
    return result


def _compare(
    console: Console, pipeline: DigitsPipeline, plan: Plan, call: dict[str, Any], repetitions: int
) -> tuple[DemoResult, Tensor, Tensor]:
    """Generate the same seeds dense and planned, both compiled, timed in pairs."""
    ditfastattn.check_sampler(plan, pipeline.scheduler, call["guidance_scale"])
    labels = torch.arange(repetitions) % NUM_CLASSES
    prompts = [
        Prompt({"class_labels": [int(label)], **call}, FIRST_TEST_SEED + number)
        for number, label in enumerate(labels)
    ]
    dense = dense_contender(pipeline, prompts, Lowering.INDUCTOR)
    planned = planned_contender(pipeline, plan, prompts, Lowering.INDUCTOR)
    with spinner(console, "compiling the dense model"):
        dense_seconds = dense.warm_up()
    console.print(f"compiled dense in {dense_seconds:.0f} s")
    with spinner(console, "compiling the planned step variants"):
        planned_seconds = planned.warm_up()
    report = _report_of(plan)
    console.print(f"compiled {report.variants} step variants in {planned_seconds:.0f} s")
    with spinner(console, f"generating {repetitions} images with each, timed in pairs"):
        timing = measure_pairs(dense.generate, planned.generate, repetitions)
    pictures, shortcuts = dense.stacked(), planned.stacked()
    quality = compare_images(pictures, shortcuts, labels)
    compiled = (dense_seconds, planned_seconds)
    return DemoResult(plan, report, timing, quality, compiled), pictures, shortcuts


def _report_of(plan: Plan) -> RunReport:
    return next(report for report in ditfastattn.reports() if report.plan == plan)


def compare_images(dense: Tensor, planned: Tensor, labels: Tensor) -> Quality:
    """Return how close ``planned`` is to ``dense``; both ``[B, 1, H, W]`` in [0, 1]."""
    ssim, psnr = image_ssim(dense, planned), image_psnr(dense, planned)
    return Quality(
        images=len(dense),
        psnr=float(psnr.mean()),
        ssim=float(ssim.mean()),
        worst_ssim=float(ssim.min()),
        dense_accuracy=class_accuracy(dense * 2.0 - 1.0, labels),
        planned_accuracy=class_accuracy(planned * 2.0 - 1.0, labels),
    )


def result_table(result: DemoResult) -> Table:
    """Return the demo's table."""
    quality, timing = result.quality, result.timing
    table = Table(title="dense and planned, both compiled, same seeds")
    for heading in ("", "dense", "planned"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("attention FLOPs kept", "100%", f"{result.attention_kept:.0%}")
    table.add_row("all matrix FLOPs kept", "100%", f"{result.flops_kept:.0%}")
    table.add_row(
        "seconds per generation (median)",
        f"{timing.baseline.median:.2f}",
        f"{timing.candidate.median:.2f}",
    )
    table.add_row(
        "  quartiles",
        f"{timing.baseline.lower_quartile:.2f}-{timing.baseline.upper_quartile:.2f}",
        f"{timing.candidate.lower_quartile:.2f}-{timing.candidate.upper_quartile:.2f}",
    )
    table.add_row("speedup (median of pairs)", "", Text(f"{timing.speedup.median:.2f}x", "bold"))
    table.add_row("PSNR to dense", "", f"{quality.psnr:.1f} dB")
    table.add_row("SSIM to dense", "", Text(f"{quality.ssim:.3f}", "bold"))
    table.add_row("  worst image", "", f"{quality.worst_ssim:.3f}")
    table.add_row(
        "classified as the requested digit",
        f"{quality.dense_accuracy:.0%}",
        f"{quality.planned_accuracy:.0%}",
    )
    table.add_row("peak cache", "0", f"{result.report.peak_cache_bytes / 2**20:.1f} MiB")
    table.add_row("step variants", "1", str(result.report.variants))
    table.add_row(
        "seconds to compile", f"{result.compile_seconds[0]:.0f}", f"{result.compile_seconds[1]:.0f}"
    )
    table.caption = f"{quality.images} images, {len(timing.speedup.samples)} repetitions"
    return table


def as_json(result: DemoResult) -> dict[str, Any]:
    """Return the measurements as JSON data; the plan has a file of its own."""
    return {
        "machine": machine(),
        "steps": result.plan.sampler.steps,
        "guidance_scale": result.plan.sampler.guidance_scale,
        "scheduler": result.plan.sampler.scheduler,
        "calibration": result.plan.calibration.model_dump(),
        "plan": summary(result.plan),
        "attention_flops_kept": result.attention_kept,
        "matrix_flops_kept": result.flops_kept,
        "variants": result.report.variants,
        "peak_cache_bytes": result.report.peak_cache_bytes,
        "compile_seconds": {
            "dense": result.compile_seconds[0],
            "planned": result.compile_seconds[1],
        },
        "quality": asdict(result.quality),
        "timing": asdict(result.timing),
    }
