"""Define what a user may ask a search for: a quality, a speedup, a latency or a threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real
from typing import Any

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.search.judge.metrics import (
    Metric,
    Psnr,
    QualityMetric,
    Ssim,
    UserMetric,
)
from ditfastattn.runtime.search.judge.perceptual import FeatureDistance, Flip
from ditfastattn.runtime.search.judge.pretrained import DEFAULT_CLIP_MODEL, ClipScore, Lpips


class TargetKind(StrEnum):
    """Name what a target bounds."""

    QUALITY = "quality"
    SPEEDUP = "speedup"
    LATENCY = "latency"
    THRESHOLD = "threshold"


@dataclass(frozen=True)
class Target:
    """Ask for a bound; use a constructor such as ``min_ssim``.

    Constructors raise a ``ConfigError`` for a bound that is out of range.

    Attributes:
        name: what is bounded: "ssim", "psnr", "lpips", "flip", "feature-distance", "clip-score",
            "speedup", "latency", "threshold", or the name of a user's metric.
        bound: the least or greatest value that will do.
        kind: what the target bounds.
        at_least: whether more is better.
        metric: how images are compared, for a quality.
    """

    name: str
    bound: float
    kind: TargetKind
    at_least: bool
    metric: QualityMetric | None = None

    @classmethod
    def min_ssim(cls, bound: float) -> Target:
        """Ask for a structural similarity of at least ``bound``, up to 1."""
        return cls._quality(Ssim(), _within(bound, 0.0, 1.0, "min_ssim", 0.95), at_least=True)

    @classmethod
    def min_psnr(cls, decibels: float) -> Target:
        """Ask for a peak signal-to-noise ratio of at least ``decibels``."""
        bound = _within(decibels, 0.0, math.inf, "min_psnr", 30.0)
        return cls._quality(Psnr(), bound, at_least=True)

    @classmethod
    def max_lpips(cls, bound: float) -> Target:
        """Ask for an LPIPS distance of at most ``bound``."""
        bound = _within(bound, 0.0, math.inf, "max_lpips", 0.1)
        return cls._quality(Lpips(), bound, at_least=False)

    @classmethod
    def max_flip(cls, bound: float) -> Target:
        """Ask for a FLIP error of at most ``bound``, up to 1."""
        bound = _within(bound, 0.0, 1.0, "max_flip", 0.05)
        return cls._quality(Flip(), bound, at_least=False)

    @classmethod
    def max_feature_distance(cls, bound: float) -> Target:
        """Ask for a distance of EfficientNet-Lite0's features of at most ``bound``."""
        bound = _within(bound, 0.0, math.inf, "max_feature_distance", 0.05)
        return cls._quality(FeatureDistance(), bound, at_least=False)

    @classmethod
    def min_clip_score(cls, bound: float, *, clip_model: str = DEFAULT_CLIP_MODEL) -> Target:
        """Ask for a CLIP score, up to 100, of at least ``bound``.

        Args:
            bound: the least score.
            clip_model: a model that is in Hugging Face's cache, or the folder of one.
        """
        bound = _within(bound, 0.0, 100.0, "min_clip_score", 30.0)
        return cls._quality(ClipScore(model=clip_model), bound, at_least=True)

    @classmethod
    def min_speedup(cls, factor: float) -> Target:
        """Ask for generations that are at least ``factor`` times as fast as dense ones."""
        bound = _within(factor, 1.0, math.inf, "min_speedup", 1.5)
        return cls("speedup", bound, TargetKind.SPEEDUP, at_least=True)

    @classmethod
    def max_latency(cls, seconds: float) -> Target:
        """Ask for generations of at most ``seconds``."""
        bound = _within(seconds, 0.0, math.inf, "max_latency", 2.0)
        return cls("latency", bound, TargetKind.LATENCY, at_least=False)

    @classmethod
    def threshold(cls, delta: float) -> Target:
        """Ask for the calibration's threshold ``delta`` itself (that of the paper)."""
        bound = _within(delta, 0.0, math.inf, "threshold", 0.075)
        return cls("threshold", bound, TargetKind.THRESHOLD, at_least=False)

    @classmethod
    def quality(
        cls,
        metric: Metric,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        name: str = "",
    ) -> Target:
        """Ask for a bound on a metric of the user's own.

        Args:
            metric: takes the dense and the planned images, both ``[B, C, H, W]`` in [0, 1], and
                returns a value per image, or one that stands for all of them. If it has a
                parameter ``call``, it is also given what the pipeline was called with, such as
                the prompt of these images.
            at_least: the least value that will do, where more is better.
            at_most: the greatest value that will do, where less is better.
            name: what to call the metric; its own name where empty.

        Raises:
            ConfigError: not exactly one of the bounds is given, or it is not a number.
        """
        where = "Target.quality(metric)"
        if not callable(metric):
            raise ConfigError("a metric must be callable", where=where, got=repr(metric))
        bound = _within(_only_bound(at_least, at_most, where), -math.inf, math.inf, "quality", 0.5)
        name = name or _name_of(metric)
        user_metric = UserMetric(name=name, label=name, function=metric)
        return cls._quality(user_metric, bound, at_least=at_least is not None)

    @classmethod
    def _quality(cls, metric: QualityMetric, bound: float, *, at_least: bool) -> Target:
        return cls(metric.name, bound, TargetKind.QUALITY, at_least, metric)

    def prepare(self, call: Mapping[str, Any]) -> None:
        """Load what the target needs, so that missing parts are reported before a generation.

        Args:
            call: what the pipeline is called with.

        Raises:
            ConfigError: a package, weights or the prompt is missing.
        """
        if self.metric is not None:
            self.metric.prepare(call)

    @property
    def image_metric(self) -> QualityMetric:
        """Return the metric of a quality.

        Raises:
            ConfigError: the target is not a quality.
        """
        if self.metric is None:
            raise ConfigError(
                "the target is not measured on images",
                where=f"target {self.name!r}",
                got=self.kind,
                expected=TargetKind.QUALITY,
            )
        return self.metric

    def met_by(self, value: float) -> bool:
        """Return whether ``value`` meets the bound."""
        return value >= self.bound if self.at_least else value <= self.bound

    def gain(self, value: float) -> float:
        """Return ``value`` with the sign that makes more of it better."""
        return value if self.at_least else -value

    def worst(self, values: Sequence[float]) -> float:
        """Return the one of ``values`` that is furthest on the bad side."""
        return min(values) if self.at_least else max(values)

    def describe(self) -> str:
        """Return the target as a phrase: "SSIM of at least 0.95 on the worst prompt"."""
        side = "at least" if self.at_least else "at most"
        match self.kind:
            case TargetKind.QUALITY:
                metric = self.image_metric
                return f"{metric.label} of {side} {self.bound:g}{metric.unit} on the worst prompt"
            case TargetKind.SPEEDUP:
                return f"speedup of {side} {self.bound:g}x"
            case TargetKind.LATENCY:
                return f"latency of {side} {self.bound:g} s"
            case TargetKind.THRESHOLD:
                return f"calibration threshold of {self.bound:g}"


def _within(value: float, above: float, up_to: float, constructor: str, example: float) -> float:
    """Return ``value`` as a float where it lies in (above, up_to] and is finite."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if number and math.isfinite(value) and above < value <= up_to:
        return float(value)
    low = f" above {above:g}" if math.isfinite(above) else ""
    high = f", {up_to:g} at most" if math.isfinite(up_to) else ""
    raise ConfigError(
        "the target's bound is out of range",
        where=f"Target.{constructor}",
        got=repr(value),
        expected=f"a finite number{low}{high}",
        remedy=f"for example {example:g}",
    )


def _only_bound(at_least: float | None, at_most: float | None, where: str) -> float:
    """Return the one bound that is given."""
    given = [bound for bound in (at_least, at_most) if bound is not None]
    if len(given) != 1:
        raise ConfigError(
            "a metric of your own needs one bound",
            where=where,
            got=f"at_least={at_least}, at_most={at_most}",
            expected="exactly one of at_least and at_most",
            remedy="pass at_least where more is better, at_most where less is better",
        )
    return given[0]


def _name_of(metric: Metric) -> str:
    name = getattr(metric, "__name__", type(metric).__name__)
    return "quality" if name == "<lambda>" else str(name)
