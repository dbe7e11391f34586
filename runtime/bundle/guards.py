"""What a bundle's graphs take for granted of the content of their inputs: compared before they run.

Where a model reads a mask or a length, its graph is one for what was read at export. The manifest
holds the whole content of each input that is read, which says more than what was read of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Final

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.records import Record
from ditfastattn.passes.capture.guards import difference
from ditfastattn.runtime.bundle.specs import Positive

_MOST_RUNS: Final = 2**16  # of a manifest that people and programs still read


class InputGuard(Record, frozen=True):
    """Say what an input of the model must hold: ``[element, count]`` of each run of equal ones.

    The elements are in row-major order. ``reads`` says what the model reads of it, and where.
    """

    name: str
    reads: Annotated[tuple[str, ...], Field(min_length=1)]
    runs: tuple[tuple[bool | int | FiniteFloat, Positive], ...]

    @property
    def count(self) -> int:
        """Return the number of elements."""
        return sum(count for _, count in self.runs)

    def content(self, like: Tensor) -> Tensor:
        """Return the expected content, in the shape, dtype and device of ``like``."""
        elements = torch.tensor([element for element, _ in self.runs], dtype=like.dtype)
        counts = torch.tensor([count for _, count in self.runs], dtype=torch.int64)
        return elements.repeat_interleave(counts).reshape(like.shape).to(like.device)


def guard_of(name: str, content: Tensor, reads: Sequence[str]) -> InputGuard:
    """Return the guard of the input ``name``, which must hold this ``content``.

    Raises:
        ConfigError: a manifest cannot hold it.
    """
    elements, counts = torch.unique_consecutive(content.cpu().flatten(), return_counts=True)
    if len(elements) > _MOST_RUNS or not bool(elements.isfinite().all()):
        raise ConfigError(
            "the graph holds only for what the model reads of an input, whose content a manifest "
            "cannot hold",
            where=f"argument {name!r}",
            got=f"{reads[0]}; {content.numel()} elements in {len(elements)} runs of equal ones",
            expected=f"at most {_MOST_RUNS} runs of finite numbers",
            remedy="run it in torch, by accelerate(pipeline, plan)",
        )
    runs = tuple(zip(elements.tolist(), counts.tolist(), strict=True))
    return InputGuard(name=name, reads=tuple(reads), runs=runs)


def check_guards(guards: Sequence[InputGuard], inputs: Mapping[str, Tensor]) -> None:
    """Refuse ``inputs`` of other content than at export, where the model reads it.

    Shapes and dtypes have been checked.

    Raises:
        ConfigError: one differs.
    """
    for guard in guards:
        got = inputs[guard.name]
        expected = guard.content(got)
        if not torch.equal(got, expected):
            found, wanted = difference(got, expected)
            raise ConfigError(
                "the bundle holds for one content of this argument, which the model reads",
                where=f"argument {guard.name!r}, {guard.reads[0]}",
                got=found,
                expected=wanted,
                remedy="export a bundle for this content, or run the plan in torch, by "
                "accelerate(pipeline, plan)",
            )


def check_described(guards: Sequence[InputGuard], sizes: Mapping[str, Sequence[int]]) -> None:
    """Raise ``ValueError`` where guards do not fit the inputs of these ``sizes``, by name."""
    for guard in guards:
        if guard.name not in sizes:
            raise ValueError(f"guards: {guard.name!r} is not an input")
        if guard.count != math.prod(sizes[guard.name]):
            raise ValueError(f"guards: {guard.name!r} has {guard.count} elements")
