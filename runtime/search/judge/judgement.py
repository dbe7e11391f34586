"""Judge images against a target: how far each is from the dense one, and how far it may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditfastattn.core.errors import TargetMissedError
from ditfastattn.runtime.search.judge.metrics import image_mse, measured, perfect_values
from ditfastattn.runtime.search.judge.targets import Target


@dataclass(frozen=True)
class Judgement:
    """Hold how one image compares with a target.

    Attributes:
        value: the metric's value.
        damage: how far the image is from the dense one: 0 is equal, and it grows as quality falls.
        allowed: the damage at the target's bound, on the same scale; negative where even the dense
            image misses the bound, None if unknown.
    """

    value: float
    damage: float
    allowed: float | None


def metric_values(
    target: Target, dense: Tensor, planned: Tensor, call: Mapping[str, Any]
) -> list[float]:
    """Return the metric's value for each image; ``call`` is what the pipeline was called with.

    Raises:
        ConfigError: the target is not a quality, the images cannot be compared, or the metric
            fails.
    """
    return measured(target.image_metric, dense, planned, call)


def judge_images(
    target: Target, dense: Tensor, planned: Tensor, call: Mapping[str, Any]
) -> list[Judgement]:
    """Return value, damage and allowed damage of each image.

    For a metric whose value for equal images is not finite, the damage is the mean squared error,
    and the allowed damage is unknown.

    Raises:
        ConfigError: as for ``metric_values``.
    """
    metric = target.image_metric
    values = metric_values(target, dense, planned, call)
    errors: list[float] = image_mse(dense, planned).tolist()
    return [
        Judgement(
            value,
            damage=error if perfect is None else metric.damage(value, perfect),
            allowed=_allowed(target, perfect),
        )
        for value, perfect, error in zip(
            values, perfect_values(metric, dense, call), errors, strict=True
        )
    ]


def dense_misses(target: Target, judged: Sequence[Judgement]) -> TargetMissedError:
    """Return that even dense images, ``judged``, miss the target."""
    worst = target.worst([item.value for item in judged])
    return TargetMissedError(
        "even the dense model misses the target",
        where=target.describe(),
        got=f"{worst:g} on the worst prompt",
        expected=target.bound,
        remedy="choose a bound that the dense images meet",
    )


def allowed_damages(target: Target, dense: Tensor, call: Mapping[str, Any]) -> list[float | None]:
    """Return the allowed damage of each image, before anything planned has run.

    Raises:
        ConfigError: as for ``metric_values``.
    """
    return [
        _allowed(target, perfect) for perfect in perfect_values(target.image_metric, dense, call)
    ]


def _allowed(target: Target, perfect: float | None) -> float | None:
    """Return the damage at the bound, where equal images have the value ``perfect``."""
    if perfect is None:
        return None
    allowed = target.image_metric.damage(target.bound, perfect)
    return allowed if target.met_by(perfect) else -allowed
