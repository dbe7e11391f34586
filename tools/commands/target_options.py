"""Turn the command line's target options into one target."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.search.judge.targets import Target

_GROUP = "Target: one of"

MinSsim = Annotated[
    float | None, typer.Option(help="SSIM to dense, worst prompt.", rich_help_panel=_GROUP)
]
MinPsnr = Annotated[
    float | None, typer.Option(help="PSNR to dense in dB, worst prompt.", rich_help_panel=_GROUP)
]
MaxLpips = Annotated[
    float | None, typer.Option(help="LPIPS to dense, worst prompt.", rich_help_panel=_GROUP)
]
MinClipScore = Annotated[
    float | None, typer.Option(help="CLIP score, worst prompt.", rich_help_panel=_GROUP)
]
MinSpeedup = Annotated[
    float | None, typer.Option(help="Speedup over dense, both compiled.", rich_help_panel=_GROUP)
]
MaxLatency = Annotated[
    float | None, typer.Option(help="Seconds per generation, compiled.", rich_help_panel=_GROUP)
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="Error at the model's output (the paper's delta, 0.025 to 0.15).",
        rich_help_panel=_GROUP,
    ),
]
MetricOption = Annotated[
    str,
    typer.Option(help="A metric of your own, package.module:function.", rich_help_panel=_GROUP),
]
LowerBound = Annotated[
    float | None, typer.Option(help="Bound of --metric, more is better.", rich_help_panel=_GROUP)
]
UpperBound = Annotated[
    float | None, typer.Option(help="Bound of --metric, less is better.", rich_help_panel=_GROUP)
]


def chosen_target(
    min_ssim: float | None,
    min_psnr: float | None,
    max_lpips: float | None,
    min_clip_score: float | None,
    min_speedup: float | None,
    max_latency: float | None,
    threshold: float | None,
    metric: str,
    at_least: float | None,
    at_most: float | None,
) -> Target | None:
    """Return the one target that was given, or None.

    Raises:
        ConfigError: more than one was given, or a bound is out of range.
    """
    makers = {
        "--min-ssim": (Target.min_ssim, min_ssim),
        "--min-psnr": (Target.min_psnr, min_psnr),
        "--max-lpips": (Target.max_lpips, max_lpips),
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
            "there is no metric for this bound",
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
        ConfigError: there is no such thing.
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
