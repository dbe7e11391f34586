"""Search with a progress bar, say beforehand what it will cost, and afterwards what came of it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ditfastattn.passes.plan.schema import Measured, Plan
from ditfastattn.runtime.reports import summary
from ditfastattn.runtime.search.record.work import SearchProgress


@contextmanager
def search_progress(console: Console) -> Generator[Callable[[SearchProgress], None]]:
    """Show a search's progress; yield what to hand it as ``on_progress``.

    The estimate printed first is an upper one: every round used.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}% of the longest search"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("searching", total=1.0)
        announced: list[str] = []

        def show(progress: SearchProgress) -> None:
            if not announced:
                bar.console.print(
                    f"the search takes at most {progress.at_most:.0f} evaluations of the model, "
                    f"about {progress.seconds_left / 60:.1f} minutes"
                )
                announced.append(progress.phase)
            bar.update(
                task,
                completed=progress.done / max(progress.at_most, 1.0),
                description=progress.phase,
            )

        yield show
        bar.update(task, completed=1.0, description="done")


def print_outcome(console: Console, plan: Plan) -> None:
    """Print what a search found, and what it measured of it."""
    found = plan.calibration
    console.print(f"plan: {summary(plan)}", soft_wrap=True)
    if found.target is not None:
        sign = ">=" if found.target.at_least else "<="
        console.print(f"target: {found.target.name} {sign} {found.target.bound:g}")
    for label, measured in (("calibration", found.calibrated), ("held-out", found.held_out)):
        if measured is not None:
            console.print(f"{label} prompts: {_described(measured)}")
    if found.measured_speedup is not None:
        console.print(
            f"speedup, both compiled: {found.measured_speedup:.2f}x, "
            f"{found.measured_seconds:.3g} s per generation"
        )
    elif found.predicted_speedup is not None:
        console.print(
            f"speedup predicted from the strategies' latencies: {found.predicted_speedup:.2f}x "
            "(`ditfastattn validate` measures it)"
        )
    console.print(f"caches: at most {found.cache_bytes / 2**20:.1f} MiB for one image")
    console.print(
        f"search: {found.method}, {found.rounds} rounds, {found.forwards:.0f} evaluations of the "
        f"model, {found.seconds:.0f} s"
    )


def _described(measured: Measured) -> str:
    return f"worst of {measured.prompts} {measured.worst:.4g}, mean {measured.mean:.4g}"
