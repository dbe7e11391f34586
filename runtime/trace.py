"""Remember a little of a generation, to tell by its content whether a call goes on with it.

Samplers compute the next latent from the last latents and what the model returned, so it is nearly
a weighted sum of those; noise that a sampler adds, or what a callback changes, leaves a part that
is not explained. A latent of another generation is explained by that one instead. Sums hold element
by element, so a few elements suffice.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditfastattn.runtime.call_order import Call

_POSITIONS = 256  # of a latent's sample, over all images
_ELEMENTS = 256  # of a condition's sample
_STEPS = 2  # remembered: samplers of second order look back one step
_FOLLOWS = 0.5  # the most unexplained part of a latent that goes on with a generation for sure
FRESH = 0.9  # the least unexplained part of a latent that begins anew
_CLEARLY = 0.95  # an explanation must leave this part of another one's rest to be better
_ROUNDING = 2.0  # steps of the dtype, in what a sampler rounds


@dataclass(frozen=True)
class Shown:
    """Hold what a call shows of its generation: samples, and what the sampler calls it."""

    latents: tuple[Tensor, ...] = ()
    conditions: tuple[Tensor, ...] = ()
    name: object | None = None
    given: tuple[weakref.ref[Tensor], ...] = ()  # the latents themselves

    def same(self, other: Shown) -> bool:
        """Return whether both show equal latents and conditions."""
        return self.same_latents(other) and self.same_conditions(other)

    def same_latents(self, other: Shown) -> bool:
        """Return whether both show equal latents."""
        return _equal(self.latents, other.latents)

    def same_conditions(self, other: Shown) -> bool:
        """Return whether both show equal conditions."""
        return _equal(self.conditions, other.conditions)

    def repeats(self, other: Shown) -> bool:
        """Return whether both show the same, but in other tensors: not one latent given twice."""
        pairs = zip(self.given, other.given, strict=False)
        again = bool(self.given) and all(one() is item() is not None for one, item in pairs)
        return self.same(other) and not again


NOTHING = Shown()


def show(latents: Sequence[Tensor], conditions: Sequence[Tensor], name: object | None) -> Shown:
    """Return what a call with these arguments shows; ``latents`` are those that may be the one."""
    return Shown(
        tuple(map(sample, latents)),
        tuple(map(_sample_condition, conditions)),
        name,
        tuple(map(weakref.ref, latents)),
    )


def sample(tensor: Tensor) -> Tensor:
    """Return a copy of a latent, or of an output like it, at some positions: ``[B, C, P]``."""
    places = max(1, _POSITIONS // max(1, len(tensor)))
    if tensor.dim() == 3:
        return tensor.detach()[:, :: max(1, tensor.shape[1] // places)].mT.clone()
    if tensor.dim() < 3:
        tensor = tensor[:, None]
    batch, channels, *grid = tensor.shape
    if tensor.is_contiguous():  # as most are; two operations then
        size = math.prod(grid)
        step = max(1, size // places)
        strides = channels * size, size, step
        return tensor.detach().as_strided((batch, channels, -(-size // step)), strides).clone()
    flat = tensor.detach().flatten(2)
    return flat[:, :, :: max(1, flat.shape[2] // places)].clone()


def _sample_condition(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // _ELEMENTS)].clone()


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(
        one.shape == other.shape and torch.equal(one, other)
        for one, other in zip(some, others, strict=True)
    )


@dataclass
class Step:
    """Hold what one step's calls showed, and samples of what they returned.

    ``halves`` says how many guidance branches a batch holds.
    """

    shown: Shown
    halves: int = 1
    outputs: list[Tensor] = field(default_factory=list)


@dataclass
class Trace:
    """What is remembered of one generation.

    Attributes:
        number: of the last call; -1 before the first.
        steps: the last ones, the newest first.
        first: what the first call of each guidance branch showed, phase by phase.
    """

    number: int = -1
    name: object | None = None
    steps: list[Step] = field(default_factory=list)
    first: dict[tuple[int, int], Shown] = field(default_factory=dict)

    def take(self, number: int, call: Call, shown: Shown) -> None:
        """Remember a call."""
        self.number, self.name = number, shown.name
        self.first.setdefault(call.place, shown)
        if call.branch == 0:
            self.steps = [Step(shown, call.halves), *self.steps][:_STEPS]

    def returned(self, output: Tensor) -> None:
        """Remember what the last call returned."""
        if self.steps:
            self.steps[0].outputs.append(sample(output))

    def began_like(self, other: Trace) -> bool:
        """Return whether both generations began with equal latents and conditions."""
        return all(
            shown.same(other.first[place])
            for place, shown in self.first.items()
            if place in other.first
        )

    def conditions(self, call: Call, shown: Shown) -> bool | None:
        """Return whether ``shown`` has the conditions of its branch's first call; None if open."""
        first = self.first.get(call.place)
        return None if first is None else shown.same_conditions(first)

    def unexplained(self, shown: Shown, halves: int) -> float:
        """Return which part of a latent the last steps do not explain: 0 to 1; NaN if unknown.

        The call holds ``halves`` guidance branches.
        """
        latents = [latent.cpu().chunk(halves)[0] for latent in shown.latents]
        parts = [self._rest(index, latent) for index, latent in enumerate(latents)]
        return max(parts, default=float("nan"))

    def _rest(self, index: int, wanted: Tensor) -> float:
        made = [part for step in self.steps for part in self._parts(step, index, wanted)]
        if not made:
            return 1.0
        channels = min(part.shape[1] for part in made)
        columns = [part[:, :channels].double().flatten() for part in made]
        target = wanted[:, :channels].double().flatten()
        matrix = torch.stack(columns, 1)
        size = float(target.norm())
        if not (matrix.isfinite().all() and target.isfinite().all()):
            return float("nan")
        solved = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
        return float((target - matrix @ solved).norm()) / size if size else 0.0

    def _parts(self, step: Step, index: int, wanted: Tensor) -> list[Tensor]:
        """Return what the next latent is made of, as far as it is like ``wanted``."""
        given = step.shown.latents[index : index + 1]
        parts = [latent.cpu().chunk(step.halves)[0] for latent in given]
        parts += [half for output in step.outputs for half in output.cpu().chunk(step.halves)]
        like = (len(wanted), wanted.shape[2])
        return [part for part in parts if (len(part), part.shape[2]) == like]


@dataclass(frozen=True)
class Place:
    """Say where a call may belong: to a generation, as this call of it."""

    trace: Trace
    call: Call

    def unexplained(self, shown: Shown) -> float:
        """Return which part of a latent is not explained there."""
        return self.trace.unexplained(shown, self.call.halves)


def belongs_elsewhere(own: Place, others: Sequence[Place], shown: Shown) -> bool:
    """Return whether a call shows that it belongs to one of ``others``, and not to ``own``."""
    return any(_fits_better(other, own, shown) for other in others)


def _fits_better(other: Place, own: Place, shown: Shown) -> bool:
    if shown.name is not None and other.trace.name is not own.trace.name:
        if shown.name is other.trace.name:
            return True
        if shown.name is own.trace.name:
            return False
    if other.trace.began_like(own.trace):
        return False  # one may go on for the other, or run again what was cancelled
    theirs, mine = (place.trace.conditions(place.call, shown) for place in (other, own))
    if mine and theirs is False:
        return False
    told = bool(theirs) and mine is False
    rest, rounding = own.unexplained(shown), _rounding(shown)
    if rest <= rounding and not told:
        return False
    left = other.unexplained(shown)
    better = rest > rounding and left < _CLEARLY * rest
    return better or (told and not left > rest / _CLEARLY + rounding)


def goes_on(other: Place, shown: Shown) -> bool:
    """Return whether a call that has no other place goes on with ``other``."""
    trace = other.trace
    if shown.name is not None:
        return shown.name is trace.name
    if trace.conditions(other.call, shown) is False or shown.same_latents(trace.first[0, 0]):
        return False
    return other.unexplained(shown) < _FOLLOWS


def _rounding(shown: Shown) -> float:
    dtypes = [latent.dtype for latent in shown.latents]
    return max((_ROUNDING * torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
