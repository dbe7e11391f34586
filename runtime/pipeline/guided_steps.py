"""At which steps of a generation guidance is on, read from how each step calls the transformer."""

from __future__ import annotations

from collections.abc import Sequence

from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.pipeline.guidance import Arguments, batched_layout, separate_layout


def layouts_at_steps(
    rows: Sequence[tuple[int, ...]],
    calls: Sequence[Sequence[Arguments]],
    layout: CfgLayout | None,
    timestep: str,
) -> tuple[CfgLayout, ...]:
    """Return how guidance reaches the transformer at each step, where it is on at some of them.

    Args:
        rows: of each call, step by step.
        calls: the tensors that each was given; those of the first step of each kind are read.
        layout: that of the guided steps; observed where None, or where it has one branch.
        timestep: the name of the transformer's timestep argument.

    Returns:
        A layout for each step; none where the calls are all alike, or change otherwise.
    """
    kinds = dict.fromkeys(rows)
    if len(kinds) != 2:
        return ()
    plain, guided = sorted(kinds, key=sum)
    if len(plain) != 1 or guided not in ((2 * plain[0],), (plain[0], plain[0])):
        return ()
    if layout is None or layout is CfgLayout.NONE:
        (conditions,), both = (calls[rows.index(kind)] for kind in (plain, guided))
        if len(guided) == 2:
            layout = separate_layout(conditions, both, timestep)
        else:
            layout = batched_layout(conditions, both[0])
    if layout is CfgLayout.NONE or layout.calls != len(guided):
        return ()
    return tuple(layout if kind == guided else CfgLayout.NONE for kind in rows)
