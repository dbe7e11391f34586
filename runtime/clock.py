"""Map each call of the model to a step by its timestep, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError

_TOLERANCE = 1e-3  # of the distance to the nearest other timestep of the schedule


class TimestepReader(Protocol):
    """Give the value of a timestep that may still be on its way from the device."""

    def ready(self) -> bool:
        """Return whether ``value`` would return without waiting."""
        ...

    def value(self) -> float:
        """Return the timestep."""
        ...


@dataclass(frozen=True)
class _HostTimestep:
    tensor: Tensor

    def ready(self) -> bool:
        return True

    def value(self) -> float:
        return float(self.tensor.flatten()[0])


class _DeviceTimestep:
    """Copy a timestep to pinned host memory behind the device's other work."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = torch.empty(1, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor.flatten()[:1], non_blocking=True)
        self._copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch
        self._copied.record()

    def ready(self) -> bool:
        return bool(self._copied.query())

    def value(self) -> float:
        self._copied.synchronize()
        return float(self._host[0])


def read_timestep(tensor: Tensor) -> TimestepReader:
    """Begin to read the timestep in ``tensor``, on the host at once, on a GPU in passing.

    Of one per image it is the first image's. Where tokens or frames have their own, ``[B, S]``,
    some may stand still (those of a given first frame are clean from the first step on), so it is
    the middle between the first image's largest and smallest: that of all where they are alike,
    and it moves with those that move.

    Raises:
        ConfigError: it has none.
    """
    if not tensor.numel():
        raise ConfigError(
            "the timestep is empty",
            where="a call of the model",
            got=f"a tensor of shape {list(tensor.shape)}",
            expected="one timestep, or one per image",
            remedy="call the model with at least one image",
        )
    if tensor.dim() > 1:
        least, most = (bound.double() for bound in tensor[0].aminmax())
        tensor = (least + most) / 2
    return _DeviceTimestep(tensor) if tensor.is_cuda else _HostTimestep(tensor)


def tolerances(timesteps: Sequence[float]) -> tuple[float, ...]:
    """Return how far off each timestep of a schedule may be, which rounding alone explains.

    Models are given integers up to 1000, thousandths of those, or one minus these.
    """
    distinct = sorted(set(timesteps))
    gaps = [later - before for before, later in pairwise(distinct)] or [abs(distinct[0]) or 1.0]
    nearest = map(min, zip([gaps[0], *gaps], [*gaps, gaps[-1]], strict=True))
    allowed = {t: _TOLERANCE * gap for t, gap in zip(distinct, nearest, strict=False)}
    return tuple(allowed[t] for t in timesteps)


@dataclass
class StepClock:
    """Count the calls of one generation, and check each against the plan's timesteps.

    On the host the timestep itself decides. On a device reading it would stall the queue, so the
    clock counts, and compares once the value has arrived (at the latest a generation later).
    """

    timesteps: Sequence[float]
    where: str
    step: int = -1
    _unchecked: list[tuple[int, TimestepReader]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Derive what deviations to allow."""
        self._tolerances = tolerances(self.timesteps)

    @property
    def at_end(self) -> bool:
        """Return whether the last call was the last one of its generation."""
        return self.step == len(self.timesteps) - 1

    @property
    def calls(self) -> int:
        """Return how many calls a generation has."""
        return len(self.timesteps)

    @property
    def repeats_first(self) -> int | None:
        """Return the next call's number, if a generation is under way and it may begin anew there.

        Its timestep is that of the first call then.
        """
        following = self.step + 1
        within = 0 < following < len(self.timesteps)
        return following if within and self.matches(self.timesteps[0], following) else None

    def matches(self, value: float, step: int) -> bool:
        """Return whether ``value`` is the timestep of a step, but for rounding."""
        return abs(value - self.timesteps[step]) <= self._tolerances[step]

    def tick(self, timestep: TimestepReader, wait: bool = False, anew: bool = False) -> int:
        """Return the step of this call; 0 begins a new generation.

        With ``wait`` the timestep itself decides on a device too. ``anew`` means that the sampler
        has begun anew: a first timestep is then that of step 0, even if later steps have it too.

        Raises:
            ConfigError: the timesteps are not those of the plan, in order.
        """
        self._check_arrived()
        following = (self.step + 1) % len(self.timesteps)
        if wait or anew or timestep.ready():
            expected = (0, following) if anew else (following, 0)
            following = self._locate(timestep.value(), expected)
        else:
            self._unchecked.append((following, timestep))
        self.step = following
        return following

    def reset(self) -> None:
        """Forget the generation under way."""
        self.step = -1
        self._unchecked.clear()

    def _locate(self, value: float, expected: Sequence[int]) -> int:
        found = next((step for step in expected if self.matches(value, step)), None)
        if found is None:
            raise self._mismatch(value, expected[0])
        return found

    def _check_arrived(self) -> None:
        while self._unchecked and self._unchecked[0][1].ready():
            step, timestep = self._unchecked.pop(0)
            if not self.matches(timestep.value(), step):
                raise self._mismatch(timestep.value(), step)

    def _mismatch(self, value: float, step: int) -> ConfigError:
        self.reset()
        return ConfigError(
            f"unexpected timestep at step {step} of {len(self.timesteps)}",
            where=self.where,
            got=value,
            expected=self.timesteps[step],
            remedy="use the plan's scheduler and step count, finish or restart generations from "
            "the first step, or calibrate a plan for this schedule; where generations take turns "
            "on one thread, give each its `ditfastattn.generation()`",
        )
