"""Judge plans of the embedded model over test images, and compare them at equal FLOPs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditfastattn.passes.analysis.flops import count_flops
from ditfastattn.runtime.pipeline.prompts import Prompt, split_prompts
from ditfastattn.runtime.search.global_chooser import GlobalChooser, make_global
from ditfastattn.runtime.search.judge.metrics import image_psnr, image_ssim
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.measure.steppers import PlanStepper
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.solve.rows import Row
from ditfastattn.tools.terminal import open_console

CALIBRATION_CLASSES = (0, 3, 5, 8)
FIRST_TEST_SEED = 1000  # the searches use seeds from 0 and 500


@dataclass(frozen=True)
class Point:
    """One plan's quality over images of the same seeds as the dense ones; PSNR in dB.

    FLOPs are the fractions kept. ``matches`` names the point whose attention FLOPs bounded this
    plan's.
    """

    method: str
    strength: float
    attention_flops: float
    matrix_flops: float
    predicted_speedup: float
    variants: int
    ssim: float
    worst_ssim: float
    psnr: float
    images: int
    ssims: tuple[float, ...]
    matches: str = ""


@dataclass(frozen=True)
class Comparison:
    """The global budget's plan against another at equal attention FLOPs, paired by seed.

    ``difference`` is the mean of the paired SSIM differences, ``error`` its standard error.
    """

    to: str
    attention_flops: float
    difference: float
    error: float
    better_on: int
    images: int


class PlanJudge:
    """Judge plans of the embedded model over the test images."""

    def __init__(self, session: Session, checkpoint: Checkpoint, images: int, steps: int) -> None:
        """Make the prompts of ``images`` test images."""
        self.work = Work(session, checkpoint, 0.0)
        self.steps = steps
        test = [
            Prompt(call_of([index % 10], steps), FIRST_TEST_SEED + index) for index in range(images)
        ]
        self.test = test
        self.calibration = split_prompts(call_of(CALIBRATION_CLASSES, steps), 0)
        self.console = open_console()
        self.dense_flops = count_flops(session.captured.module.graph).times(steps)

    def make_global(self, objective: Objective) -> GlobalChooser:
        """Return a chooser with one budget for all steps."""
        return make_global(self.work, self.calibration, Target.min_ssim(0.9), objective)

    def point(
        self,
        method: str,
        strength: float,
        rows: list[Row],
        predicted: float,
        matches: str = "",
    ) -> Point:
        """Judge a plan, or read the result from the checkpoint."""

        def make() -> dict[str, Any]:
            pairs = [self._images(index, rows) for index in range(len(self.test))]
            ssims = [float(image_ssim(dense, planned)[0]) for dense, planned in pairs]
            psnrs = [float(image_psnr(dense, planned)[0]) for dense, planned in pairs]
            return {"ssims": ssims, "psnrs": [min(psnr, 99.0) for psnr in psnrs]}

        name = f"point-{method}-{strength:.9g}"
        data = self.work.checkpoint.data(name, make)
        kept, dense = self.work.variants.flops(rows), self.dense_flops
        ssims, psnrs = data["ssims"], data["psnrs"]
        point = Point(
            method=method,
            strength=strength,
            attention_flops=kept.attention / dense.attention,
            matrix_flops=kept.total / dense.total,
            predicted_speedup=predicted,
            variants=len(self.work.variants.programs(rows)[0].variants),
            ssim=sum(ssims) / len(ssims),
            worst_ssim=min(ssims),
            psnr=sum(psnrs) / len(psnrs),
            images=len(ssims),
            ssims=tuple(ssims),
            matches=matches,
        )
        self.console.print(
            f"{method} {strength:.4g}: attention {point.attention_flops:.1%}, "
            f"all {point.matrix_flops:.1%}, SSIM {point.ssim:.4f} (worst {point.worst_ssim:.4f})"
        )
        return point

    def _images(self, index: int, rows: list[Row]) -> tuple[Tensor, Tensor]:
        dense = self.work.dense("test", index, self.test[index])
        stepper = PlanStepper(self.work.variants, rows)
        return dense, self.work.run(stepper, self.test[index], float(self.steps))


def compared(ours: Point, other: Point) -> Comparison:
    """Return the comparison of two plans over the same seeds."""
    pairs = list(zip(ours.ssims, other.ssims, strict=True))
    differences = [one - another for one, another in pairs]
    return Comparison(
        to=ours.matches,
        attention_flops=other.attention_flops,
        difference=statistics.fmean(differences),
        error=statistics.stdev(differences) / math.sqrt(len(differences)),
        better_on=sum(difference > 0.0 for difference in differences),
        images=len(differences),
    )


def of_flops(judge: PlanJudge, chooser: GlobalChooser, wanted: float) -> tuple[list[Row], float]:
    """Return the gentlest plan that keeps at most the ``wanted`` fraction of attention FLOPs."""
    low, high = 1e-4, 1e2
    best: list[Row] = chooser.rows(high)
    for _ in range(24):
        middle = (low * high) ** 0.5
        rows = chooser.rows(middle)
        if judge.work.variants.flops(rows).attention <= wanted * judge.dense_flops.attention:
            best, high = rows, middle
        else:
            low = middle
    return best, high


def call_of(classes: Sequence[int], steps: int) -> dict[str, Any]:
    """Return the arguments of a generation of the embedded model."""
    return {"class_labels": list(classes), "num_inference_steps": steps, "guidance_scale": 2.0}


def first_prompt(steps: int) -> Prompt:
    """Return the first calibration prompt."""
    return split_prompts(call_of(CALIBRATION_CLASSES, steps), 0)[0]
