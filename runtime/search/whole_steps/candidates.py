"""The plans of whole steps that a search judges: fitted once each, written as plans."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from ditfastattn.passes.analysis.site import Coefficients
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.phases import Span
from ditfastattn.passes.plan.strategies import FITTED, Strategy
from ditfastattn.runtime.search.whole_steps.observed import Observed


@dataclass(frozen=True)
class FittedMask:
    """Hold the steps that run, and the coefficients of the others, guided (see ``fit``)."""

    runs: tuple[int, ...]
    coefficients: tuple[Tensor | None, ...]
    outputs: int  # that a fitted step reads at most

    def column(self, spans: Sequence[Span]) -> tuple[Strategy, ...]:
        """Return the strategy of the whole output at each step; ``spans`` are the phases."""
        return output_column(self.runs, spans, self.outputs)


def output_column(
    runs: Collection[int], spans: Sequence[Span], outputs: int
) -> tuple[Strategy, ...]:
    """Return the strategy of the whole output at each step; at most ``outputs`` are read.

    They are outputs of the same phase, and the first step of each of the ``spans`` runs.
    """
    column: list[Strategy] = []
    for steps, _ in spans:
        for step in steps:
            known = sum(run in runs for run in range(steps.start, step))
            column.append(Strategy.FULL if step in runs else FITTED[min(outputs, known) - 1])
    return tuple(column)


def planned_coefficients(mask: FittedMask, observed: Observed) -> Coefficients:
    """Return the coefficients of ``mask`` as a plan has them, step by step."""
    parts = zip(mask.coefficients, observed.layouts, observed.steps, strict=True)
    return tuple(
        () if found is None else branch_rows(found, layout, step.guidance.shares)
        for found, layout, step in parts
    )


def branch_rows(
    guided: Tensor, layout: CfgLayout, shares: Sequence[float]
) -> tuple[tuple[float, ...], ...]:
    """Return the coefficients of each branch, given those of the guided output.

    In a batch both branches return the guided output, which guidance then leaves as it is. In two
    calls each branch sees its own outputs alone: its coefficients are divided by its share, so
    that guidance adds up the same.
    """
    numbers: list[float] = guided.tolist()
    if layout.batched:
        return (tuple(numbers), tuple(numbers))
    if layout is CfgLayout.NONE:
        return (tuple(numbers),)
    return tuple(
        (numbers[0], *(number / shares[branch] for number in numbers[1 + branch :: 2]))
        for branch in (0, 1)
    )
