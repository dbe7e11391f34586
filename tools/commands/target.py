"""Make one target of the command line's target options."""

from __future__ import annotations

import importlib
from typing import Any

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.search.judge.targets import Target


def chosen_target(
    min_ssim: float | None = None,
    min_psnr: float | None = None,
    max_lpips: float | None = None,
    max_flip: float | None = None,
    max_feature_distance: float | None = None,
    min_clip_score: float | None = None,
    min_speedup: float | None = None,
    max_latency: float | None = None,
    threshold: float | None = None,
    metric: str = "",
    at_least: float | None = None,
    at_most: float | None = None,
) -> Target | None:
    """Return the target that was given, or None.

    Raises:
        ConfigError: more than one was given, or a bound is out of range.
    """
    makers = {
        "--min-ssim": (Target.min_ssim, min_ssim),
        "--min-psnr": (Target.min_psnr, min_psnr),
        "--max-lpips": (Target.max_lpips, max_lpips),
        "--max-flip": (Target.max_flip, max_flip),
        "--max-feature-distance": (Target.max_feature_distance, max_feature_distance),
        "--min-clip-score": (Target.min_clip_score, min_clip_score),
        "--min-speedup": (Target.min_speedup, min_speedup),
        "--max-latency": (Target.max_latency, max_latency),
        "--threshold": (Target.threshold, threshold),
    }
    given = {name: (make, bound) for name, (make, bound) in makers.items() if bound is not None}
    names = [*given, *(["--metric"] if metric else [])]
    if len(names) > 1:
        raise ConfigError(
            "a search has one target",
            where="the command line",
            got=", ".join(names),
            expected="one of " + ", ".join([*makers, "--metric"]),
            remedy="search for one, and measure the others with `ditfastattn validate`",
        )
    if metric:
        return Target.quality(load_metric(metric), at_least=at_least, at_most=at_most)
    if at_least is not None or at_most is not None:
        raise ConfigError(
            "this bound has no metric",
            where="--at-least or --at-most",
            remedy="name one with --metric package.module:function",
        )
    for make, bound in given.values():
        assert bound is not None
        return make(bound)
    return None


def load_metric(name: str) -> Any:
    """Import ``package.module:function``.

    Raises:
        ConfigError: it cannot be imported.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            "cannot import the metric",
            where="--metric",
            got=f"{name} ({error})",
            expected="package.module:function on Python's path",
        ) from error
