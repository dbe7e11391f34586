"""Writes to a graph's own tensors become values; writes that others could see are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ditfastattn import ConfigError
from ditfastattn.passes.functionalize import is_write
from tests.helpers import capture_model


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def scaled_table(x: Tensor) -> Tensor:
    table = torch.arange(4, dtype=torch.float32)
    before = table.sum()
    table /= 2.0
    after = table * x
    table.add_(before).mul_(x[0, 0])
    return after + table


def own_then_viewed(x: Tensor) -> Tensor:
    own = x + 1
    own.mul_(3)
    return own.t().contiguous()


def interleaved(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * 2.0
    out[..., 1::2] = 1.0
    return out


def a_part_scaled(x: Tensor) -> Tensor:
    own = x + 1
    own[0].mul_(3.0)
    own[1:, 2] += own[0, 0]
    return own.double()


def a_part_cast(x: Tensor) -> Tensor:
    own = torch.zeros(x.shape, dtype=torch.float64)
    own[:, 1:3] = x[:, :1]
    return own


@pytest.mark.parametrize(
    "function", [scaled_table, own_then_viewed, interleaved, a_part_scaled, a_part_cast]
)
def test_own_tensors_become_values(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4)
    graph = capture_model(Applied(function), {"x": x})
    assert not any(map(is_write, graph.module.graph.nodes))
    (result,) = graph.module(x)
    assert torch.equal(result, function(x.clone()))


def input_written(x: Tensor) -> Tensor:
    return x.mul_(2.0)


def viewed_elsewhere(x: Tensor) -> Tensor:
    own = x + 1
    view = own.t()
    own.mul_(3.0)
    return view + 1


def a_part_viewed_elsewhere(x: Tensor) -> Tensor:
    own = x + 1
    view = own.t()
    own[0].mul_(3.0)
    return view + own.t()


@pytest.mark.parametrize("function", [input_written, viewed_elsewhere, a_part_viewed_elsewhere])
def test_what_others_could_see_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ConfigError, match="writes in place"):
        capture_model(Applied(function), {"x": torch.randn(3, 4)})
