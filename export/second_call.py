"""The second of the two calls that guidance makes a step: it must be like the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.capture_call import CapturedCall, RecordedCall
from ditfastattn.runtime.bundle.arguments import argument_named
from ditfastattn.runtime.bundle.guards import InputGuard, check_guards


def second_inputs(
    captured: CapturedCall,
    call: RecordedCall,
    second: RecordedCall | None,
    guards: Sequence[InputGuard],
) -> dict[str, Tensor]:
    """Return the inputs of a step's ``second`` call by name, which must be like those of ``call``.

    Raises:
        ConfigError: there is none, or the graph of the first call does not hold for it: it has
            other shapes, or other content where the model reads it.
    """
    if second is None:
        raise ConfigError(
            "the plan's guidance calls the model twice a step, and one call is known",
            where="export(call)",
            remedy="export from a pipeline, called with the plan's guidance scale",
        )
    if _without_tensors(call.arguments) != _without_tensors(second.arguments):
        raise ConfigError(
            "a step's two calls differ in more than tensors",
            where="export(pipeline)",
            got=str(_without_tensors(second.arguments))[:200],
            expected=str(_without_tensors(call.arguments))[:200],
            remedy="run the plan in torch, by accelerate(pipeline, plan)",
        )
    found: dict[str, Tensor] = {}
    for entry, example in zip(captured.graph.inputs, captured.tensors, strict=True):
        if entry.static:
            continue
        found[entry.name] = argument_named(entry.name, second.arguments)
        got, wanted = found[entry.name], example
        if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
            raise ConfigError(
                "a step's two calls have inputs of other shapes or dtypes",
                where=f"argument {entry.name!r}",
                got=f"{list(got.shape)} of {got.dtype} in the second call",
                expected=f"{list(wanted.shape)} of {wanted.dtype}",
                remedy="pad both prompts to one length, or run the plan in torch",
            )
    check_guards(guards, found)
    return found


def _without_tensors(item: Any) -> Any:
    if isinstance(item, Tensor):
        return Tensor
    if isinstance(item, (tuple, list)):
        return [_without_tensors(part) for part in item]
    if isinstance(item, Mapping):
        return {key: _without_tensors(part) for key, part in item.items()}
    return item
