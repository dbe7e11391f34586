"""Calibrate with a progress bar, and say beforehand what it will cost at most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import ditfastattn
from ditfastattn.passes.plan import Plan
from ditfastattn.runtime import calibration


def calibrate_with_progress(
    console: Console, pipeline: Any, call: Mapping[str, Any], threshold: float, seed: int
) -> Plan:
    """Return the plan that ``ditfastattn.calibrate`` finds, showing how far it is."""
    columns = (
        TextColumn("calibrating, step {task.fields[step]}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}% of the longest search"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("calibrate", total=1.0, step="0")

        def show(progress: calibration.Progress) -> None:
            if progress.step == 0:
                bar.console.print(
                    f"calibration at threshold {threshold:g}: at most {progress.at_most:.0f} "
                    f"evaluations of the model, {progress.seconds_left / 60:.1f} minutes"
                )
            bar.update(
                task,
                completed=progress.done / progress.at_most,
                step=f"{progress.step + 1}/{progress.steps}",
            )

        plan = ditfastattn.calibrate(
            pipeline, call, threshold=threshold, seed=seed, on_progress=show
        )
        bar.update(task, completed=1.0)
    console.print(
        f"calibrated in {plan.calibration.seconds:.0f} s, "
        f"{plan.calibration.forwards:.0f} evaluations of the model"
    )
    return plan
