"""Targets: their bounds, what they measure on images, and what they refuse."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ditfastattn import ConfigError
from ditfastattn.runtime.search.judge.judgement import allowed_damages, judge_images, metric_values
from ditfastattn.runtime.search.judge.metrics import image_mse, image_psnr, image_ssim
from ditfastattn.runtime.search.judge.targets import Target, TargetKind

DENSE = torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(0))
NOISE = torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(1)) - 0.5
AMOUNTS = torch.tensor([0.0, 0.05, 0.2]).reshape(3, 1, 1, 1)
PLANNED = (DENSE + AMOUNTS * NOISE).clamp(0.0, 1.0)  # the first image is the dense one
BUILT_IN = (Target.min_ssim(0.9), Target.min_psnr(30.0))


def mean_error(dense: Tensor, planned: Tensor) -> Tensor:
    return (dense - planned).abs().flatten(1).mean(1)


@pytest.mark.parametrize(
    ("target", "kind", "name", "phrase"),
    [
        (Target.min_ssim(0.95), "quality", "ssim", "SSIM of at least 0.95 on the worst prompt"),
        (Target.min_psnr(30), "quality", "psnr", "PSNR of at least 30 dB on the worst prompt"),
        (Target.max_lpips(0.1), "quality", "lpips", "LPIPS of at most 0.1 on the worst prompt"),
        (Target.max_flip(0.1), "quality", "flip", "FLIP of at most 0.1 on the worst prompt"),
        (
            Target.max_feature_distance(0.1),
            "quality",
            "feature-distance",
            "feature distance of at most 0.1 on the worst prompt",
        ),
        (
            Target.min_clip_score(28.5),
            "quality",
            "clip-score",
            "CLIP score of at least 28.5 on the worst prompt",
        ),
        (Target.min_speedup(1.5), "speedup", "speedup", "speedup of at least 1.5x"),
        (Target.max_latency(2.5), "latency", "latency", "latency of at most 2.5 s"),
        (Target.threshold(0.075), "threshold", "threshold", "calibration threshold of 0.075"),
        (
            Target.quality(mean_error, at_most=0.1),
            "quality",
            "mean_error",
            "mean_error of at most 0.1 on the worst prompt",
        ),
    ],
)
def test_a_target_says_what_is_asked_for(target: Target, kind: str, name: str, phrase: str) -> None:
    assert (target.kind, target.name, target.describe()) == (TargetKind(kind), name, phrase)
    assert target.met_by(target.bound)
    assert not target.met_by(math.nan)
    better = target.bound + 1.0 if target.at_least else target.bound - 1.0
    assert target.met_by(better)
    assert not target.met_by(2.0 * target.bound - better)
    assert not target.met_by(target.worst([better, 2.0 * target.bound - better, target.bound]))


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (Target.min_ssim, (0.0, -1.0, 1.01, math.nan)),
        (Target.min_psnr, (0.0, math.inf)),
        (Target.max_lpips, (0.0, math.inf)),
        (Target.max_flip, (0.0, 1.1)),
        (Target.max_feature_distance, (0.0, math.inf)),
        (Target.min_clip_score, (0.0, 100.1)),
        (Target.min_speedup, (1.0, 0.5, math.inf)),
        (Target.max_latency, (0.0, math.inf)),
        (Target.threshold, (0.0, -0.1, "0.1", True, None)),
    ],
)
def test_a_bound_out_of_range_is_refused(make: Callable[..., Target], bad: tuple[Any, ...]) -> None:
    for bound in bad:
        with pytest.raises(
            ConfigError, match=r"Target\.\w+: [\s\S]*got:[\s\S]*expected:[\s\S]*rem"
        ):
            make(bound)


def test_targets_are_equal_where_they_ask_for_the_same() -> None:
    assert Target.min_ssim(1) == Target.min_ssim(1.0)
    assert Target.min_ssim(0.9) != Target.min_ssim(0.8)
    assert Target.min_clip_score(30, clip_model="a") != Target.min_clip_score(30, clip_model="b")
    assert "0x" not in repr(Target.quality(mean_error, at_most=0.1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_images_are_perfect_without_a_warning(channels: int, dtype: torch.dtype) -> None:
    images = torch.stack([torch.full((channels, 16, 16), 0.7), torch.zeros(channels, 16, 16)])
    images = torch.cat([images, DENSE[:, :channels, :16, :16]]).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric_values(Target.min_ssim(1.0), images, images.clone(), {}) == [1.0] * 5
        assert metric_values(Target.min_psnr(99.0), images, images.clone(), {}) == [math.inf] * 5
    for target in BUILT_IN:
        judged = judge_images(target, images, images.clone(), {})
        assert [entry.damage for entry in judged] == [0.0] * 5


def test_values_are_those_of_each_image_and_damage_grows_as_they_fall() -> None:
    for target in BUILT_IN:
        judged = judge_images(target, DENSE, PLANNED, {})
        values = [entry.value for entry in judged]
        assert values == metric_values(target, DENSE, PLANNED, {})
        assert values == sorted(values, reverse=True)
        assert target.worst(values) == values[2]
        damages = [entry.damage for entry in judged]
        assert damages == sorted(damages)
        assert damages[0] == 0.0
        assert allowed_damages(target, DENSE, {}) == [entry.allowed for entry in judged]
        for entry in judged:
            assert entry.allowed is not None
            assert target.met_by(entry.value) == (entry.damage <= entry.allowed)


def test_ssim_and_psnr_are_what_they_are_called() -> None:
    darker = torch.full((1, 1, 16, 16), 0.5)
    assert float(image_psnr(darker + 0.1, darker)) == pytest.approx(20.0, abs=1e-4)
    means = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)  # nothing but the mean differs
    assert float(image_ssim(darker + 0.1, darker)) == pytest.approx(means, abs=1e-3)
    judged = judge_images(Target.min_psnr(30.0), DENSE, PLANNED, {})
    errors = image_mse(DENSE, PLANNED).tolist()
    assert [entry.damage for entry in judged] == pytest.approx(errors, rel=1e-4)
    assert judged[0].allowed == pytest.approx(1e-3)


def test_images_below_the_window_of_ssim_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"too small for SSIM[\s\S]*24 x 10[\s\S]*11 or more"):
        metric_values(Target.min_ssim(0.9), DENSE[..., :10], PLANNED[..., :10], {})


@pytest.mark.parametrize(
    ("dense", "planned", "reason"),
    [
        (DENSE, PLANNED[:2], r"do not match[\s\S]*\[3, 3, 24, 20\] and \[2, 3, 24, 20\]"),
        (DENSE[0], PLANNED[0], "do not match"),
        (DENSE[:0], PLANNED[:0], "do not match"),
        (DENSE * 2.0 - 1.0, PLANNED, "dense images: [^:]*range"),
        (DENSE, PLANNED * math.nan, r"planned images: [^:]*range[\s\S]*nan"),
    ],
)
def test_images_that_cannot_be_compared_are_refused(
    dense: Tensor, planned: Tensor, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        metric_values(Target.min_psnr(30.0), dense, planned, {})


@pytest.mark.parametrize("kind", ["min_speedup", "max_latency", "threshold"])
def test_only_a_quality_is_measured_on_images(kind: str) -> None:
    target: Target = getattr(Target, kind)(2.0)
    target.prepare({})  # nothing to do
    with pytest.raises(ConfigError, match="not measured on images"):
        metric_values(target, DENSE, PLANNED, {})


def test_a_metric_of_the_users_own_is_used_as_given() -> None:
    target = Target.quality(mean_error, at_most=0.02)
    judged = judge_images(target, DENSE, PLANNED, {})
    assert [entry.value for entry in judged] == pytest.approx(mean_error(DENSE, PLANNED).tolist())
    assert [entry.damage for entry in judged] == [entry.value for entry in judged]
    assert [entry.allowed for entry in judged] == [0.02] * 3
    assert target.worst([0.1, 0.3]) == 0.3


def test_a_single_value_stands_for_every_image() -> None:
    target = Target.quality(lambda dense, planned: 0.5, at_least=0.25, name="half")
    assert target.name == "half"
    assert metric_values(target, DENSE, PLANNED, {}) == [0.5, 0.5, 0.5]


class Asked:
    """Return the number that was asked for."""

    def __call__(self, dense: Tensor, planned: Tensor, call: Mapping[str, Any]) -> Tensor:
        return torch.tensor(call["class_labels"])


def by_keyword(dense: Tensor, planned: Tensor, *, call: Mapping[str, Any]) -> Tensor:
    return torch.tensor(call["class_labels"])


@pytest.mark.parametrize("metric", [Asked(), by_keyword, lambda dense, planned, **_: [3, 5, 8]])
def test_a_metric_with_a_parameter_call_is_told_what_was_asked_for(metric: Any) -> None:
    target = Target.quality(metric, at_least=1)
    assert metric_values(target, DENSE, PLANNED, {"class_labels": [3, 5, 8]}) == [3.0, 5.0, 8.0]


def test_what_the_dense_image_scores_is_the_measure_of_damage() -> None:
    """A metric that looks at the planned image alone: its mean brightness."""
    target = Target.quality(lambda _, planned: planned.flatten(1).mean(1), at_least=0.5)
    dense = torch.stack([torch.full((1, 4, 4), level) for level in (0.75, 0.25)])
    judged = judge_images(target, dense, dense - 0.125, {})
    assert [entry.damage for entry in judged] == [0.125, 0.125]
    assert [entry.allowed for entry in judged] == [0.25, -0.25]  # the second misses the bound
    assert target.name == "quality"


@pytest.mark.parametrize("perfect", [math.inf, math.nan])
def test_without_a_finite_perfect_value_damage_is_the_squared_error(perfect: float) -> None:
    def closeness(dense: Tensor, planned: Tensor) -> Tensor:
        error = image_mse(dense, planned)
        return torch.where(error == 0.0, perfect, 1.0 / error)

    target = Target.quality(closeness, at_least=10.0)
    judged = judge_images(target, DENSE[1:], PLANNED[1:], {})
    assert [entry.damage for entry in judged] == image_mse(DENSE[1:], PLANNED[1:]).tolist()
    assert [entry.allowed for entry in judged] == [None, None]


def broken(dense: Tensor, planned: Tensor) -> Tensor:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        (lambda d, p: torch.zeros(2), r"got: +shape \[2\][\s\S]*3 values"),
        (lambda d, p: p, r"got: +shape \[3, 3, 24, 20\]"),
        (lambda d, p: torch.zeros(0), r"got: +shape \[0\]"),
        (lambda d, p: None, "got: +None"),
        (lambda d, p: math.nan, r"not a number[\s\S]*nan"),
        (lambda d, p: torch.tensor([1.0, math.nan, 1.0]), r"got: +\[1.0, nan, 1.0\]"),
        (broken, "got: +RuntimeError: out of luck"),
    ],
)
def test_a_metric_at_fault_is_named(metric: Any, reason: str) -> None:
    target = Target.quality(metric, at_least=0.5, name="mine")
    with pytest.raises(ConfigError, match=rf"metric 'mine'[\s\S]*{reason}"):
        metric_values(target, DENSE, PLANNED, {})


@pytest.mark.parametrize("bounds", [{}, {"at_least": 0.1, "at_most": 0.2}])
def test_a_metric_needs_exactly_one_bound(bounds: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="exactly one of at_least and at_most"):
        Target.quality(mean_error, **bounds)


def test_a_metric_must_be_callable_and_its_bound_finite() -> None:
    not_a_metric: Any = "ssim"
    with pytest.raises(ConfigError, match=r"callable[\s\S]*'ssim'"):
        Target.quality(not_a_metric, at_least=0.5)
    with pytest.raises(ConfigError, match="out of range"):
        Target.quality(mean_error, at_most=math.inf)


@pytest.mark.slow
def test_defining_targets_loads_no_metric_library() -> None:
    code = (
        "import sys; from ditfastattn.runtime.search.judge.targets import Target as T;"
        "T.min_ssim(0.9); T.max_lpips(0.1); T.min_clip_score(30);"
        "T.max_flip(0.1); T.max_feature_distance(0.1);"
        "loaded = {'flip_evaluator', 'torchmetrics', 'torchvision', 'transformers'};"
        "assert not loaded & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
