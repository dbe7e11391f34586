"""Which of a watched generation's calls are guided, and what the others are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ditfastattn.export.capture_call import RecordedCall
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Sampler
from ditfastattn.runtime.bundle.unguided import conditional_rows
from ditfastattn.runtime.call_order import calls_in_order, other_calls, other_rows

_WHERE = "export(pipeline)"


def guided_calls(
    calls: Sequence[Mapping[str, Any]], sampler: Sampler | None
) -> tuple[RecordedCall, ...]:
    """Return the calls of the first step that is guided as ``sampler`` says; None has one call.

    Raises:
        ConfigError: the calls are not those of the sampler's phases.
    """
    if sampler is None:
        return (RecordedCall(calls[0]),)
    if sampler.phases:
        _check_phases(calls, sampler)
    first = sampler.layouts.index(sampler.cfg_layout)
    order = calls_in_order(sampler.spans)
    at = [number for number, call in enumerate(order) if call.step == first]
    return tuple(map(RecordedCall, calls[at[0] : at[-1] + 1]))


def _check_phases(calls: Sequence[Mapping[str, Any]], sampler: Sampler) -> None:
    order = calls_in_order(sampler.spans)
    if len(calls) != len(order):
        raise other_calls(order, f"{len(calls)} calls", _WHERE)
    rows = [RecordedCall(call).batch for call in calls]
    images = rows[0] // order[0].halves
    for call, got in zip(order, rows, strict=True):
        if got != images * call.halves:
            raise other_rows(order, images, f"{got} row(s) at step {call.step}", _WHERE)


def expected_arguments(
    calls: Sequence[Mapping[str, Any]], sampler: Sampler
) -> list[tuple[Mapping[str, Any], ...]]:
    """Return, for each call, what its conditions may be: as at the first guided step.

    At a step without guidance those are the conditional part; what has no rows is whole there too.
    """
    first = guided_calls(calls, sampler)
    guided = [call.arguments for call in first]
    whole = guided[sampler.cfg_layout.conditional_call]
    half = {name: _conditional(item, sampler.cfg_layout) for name, item in whole.items()}
    layouts = sampler.layouts
    return [
        (guided[call.branch],) if layouts[call.step] is sampler.cfg_layout else (half, whole)
        for call in calls_in_order(sampler.spans)
    ]


def _conditional(item: Any, layout: CfgLayout) -> Any:
    if isinstance(item, Tensor):
        return conditional_rows(item, [0], layout) if item.dim() else item
    if isinstance(item, (tuple, list)):
        return type(item)(_conditional(part, layout) for part in item)
    if isinstance(item, dict):
        return {key: _conditional(part, layout) for key, part in item.items()}
    return item
