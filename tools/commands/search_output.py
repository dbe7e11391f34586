"""Show a search in the terminal: its cost beforehand, its progress, and its outcome."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console

from ditfastattn.passes.plan.calibration import Measured
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.reports import summary
from ditfastattn.runtime.search.record.work import SearchProgress
from ditfastattn.tools.terminal import duration, progress_bar


@contextmanager
def search_progress(console: Console) -> Generator[Callable[[SearchProgress], None]]:
    """Show a search's progress; yield what to pass it as ``on_progress``.

    As soon as the pace is known, it prints how long such a search usually takes.
    """
    with progress_bar(console, "searching", percentage_of="the search, about") as advance:
        announced = False

        def show(progress: SearchProgress) -> None:
            nonlocal announced
            expected = progress.expected or progress.at_most
            if not announced and progress.seconds_left:
                console.print(
                    f"the search takes about {duration(progress.seconds_left)}: {expected:.0f} "
                    f"evaluations of the model, at most {progress.at_most:.0f}",
                    soft_wrap=True,
                )
                announced = True
            advance(progress.phase, min(progress.done / max(expected, 1.0), 0.99))

        yield show
        advance("done", 1.0)


def print_outcome(console: Console, plan: Plan) -> None:
    """Print what a search found and what it measured."""
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
            f"predicted speedup, from the strategies' latencies: {found.predicted_speedup:.2f}x "
            "(`ditfastattn validate` measures it)"
        )
    console.print(f"caches: at most {found.cache_bytes / 2**20:.1f} MiB for one image")
    for tried in found.tried:
        speedup = "" if tried.predicted_speedup is None else f" {tried.predicted_speedup:.2f}x,"
        console.print(f"tried: {tried.what}:{speedup} {tried.outcome}", soft_wrap=True)
    console.print(
        f"search: {found.method}, {found.rounds} rounds, {found.forwards:.0f} evaluations of the "
        f"model, {found.seconds:.0f} s"
    )


def _described(measured: Measured) -> str:
    return f"worst of {measured.prompts} {measured.worst:.4g}, mean {measured.mean:.4g}"
