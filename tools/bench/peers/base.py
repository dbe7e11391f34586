"""What a peer is: a caching library's method, and how to apply it to a transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

Options = Mapping[str, Any]
Scope = Callable[[], AbstractContextManager[None]]  # entered around each generation


@dataclass(frozen=True)
class Setting:
    """One point of a peer's sweep."""

    label: str
    options: Options


@dataclass
class Clock:
    """The timestep of the current call."""

    timestep: int = 0


@dataclass
class Subject:
    """What a peer is applied to: a copy of a transformer, which it changes in place.

    Attributes:
        transformer: the copy.
        steps: sampler steps.
        guided: whether guidance doubles the batch.
        clock: the timestep of the current call.
        calibration: the result of the peer's own calibration.
    """

    transformer: torch.nn.Module
    steps: int
    guided: bool = True
    clock: Clock = field(default_factory=Clock)
    calibration: Any = None


@dataclass(frozen=True)
class Peer:
    """A caching library's method.

    Attributes:
        name: its name in options and records.
        apply: changes a subject's transformer; returns a context for each generation, which
            clears the state of the previous one.
        settings: the sweep, gentle to strong.
        dense: a setting with which the method computes everything.
        library: the module it is imported from.
        inside: whether its hooks are inside the blocks, not around them.
        reads_timestep: whether it reads ``Subject.clock``.
        unconditional_first: whether it requires the unconditional half of guidance first.
        calibrate: measures what the method needs to know about the model, as JSON data; it is
            given a function that runs one generation in a context.
    """

    name: str
    apply: Callable[[Subject, Options], Scope]
    settings: tuple[Setting, ...]
    dense: Setting
    library: str = "diffusers"
    inside: bool = False
    reads_timestep: bool = False
    unconditional_first: bool = False
    calibrate: Callable[[Subject, Callable[[Scope], None]], Any] | None = None


def thresholds(name: str, *values: float, **others: Any) -> tuple[Setting, ...]:
    """Return a setting per value of the option ``name``."""
    return tuple(Setting(f"threshold {value:g}", {name: value, **others}) for value in values)


THRESHOLDS = (0.03, 0.05, 0.07, 0.09, 0.11, 0.14, 0.2)  # gentle to strong, of several peers
