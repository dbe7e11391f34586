"""Writes to a graph's own tensors become values; writes that others could see are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ditfastattn import ConfigError
from ditfastattn.passes.graph.aliases import is_write
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


def viewed_before(x: Tensor) -> Tensor:
    own = x + 1
    view = own.t()
    own.mul_(3.0)
    return view + 1


def a_part_viewed_before(x: Tensor) -> Tensor:
    own = x + 1
    first, rest = own[:1], own[1:]
    first.add_(rest[:1])
    rest.mul_(first)
    return own.t() + own.t().sum()


def through_a_view(x: Tensor) -> Tensor:
    turned = (x + 1).transpose(0, 1).float()
    turned[1:] = 2.0
    return turned * 3


def one_of_two_results(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
    variance.add_(1.0)
    return (x - mean) / variance


def an_unmarked_view(x: Tensor) -> Tensor:
    turned = torch.einsum("ij->ji", x + 1)
    turned.mul_(3.0)
    return turned + turned.sum()


def kept_in_its_format(x: Tensor) -> Tensor:
    own = x + 1
    view = own.contiguous(memory_format=torch.contiguous_format)
    own.mul_(3.0)
    return view + 1


@pytest.mark.parametrize(
    "function",
    [
        scaled_table,
        own_then_viewed,
        interleaved,
        a_part_scaled,
        a_part_cast,
        viewed_before,
        a_part_viewed_before,
        through_a_view,
        one_of_two_results,
        an_unmarked_view,
        kept_in_its_format,
    ],
)
def test_own_tensors_become_values(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4)
    graph = capture_model(Applied(function), {"x": x})
    assert not any(map(is_write, graph.module.graph.nodes))
    (result,) = graph.module(x)
    assert torch.equal(result, function(x.clone()))


def input_written(x: Tensor) -> Tensor:
    return x.mul_(2.0)


def a_part_of_an_input_written(x: Tensor) -> Tensor:
    x[0] = 1.0
    return x + 1


def the_whole_used_later(x: Tensor) -> Tensor:
    own = x + 1
    own.t().mul_(3.0)
    return own + 1


def through_an_unmarked_view(x: Tensor) -> Tensor:
    own = x + 1
    torch.einsum("ij->ji", own).mul_(3.0)
    return own + 1


def through_an_idle_dropout(x: Tensor) -> Tensor:
    own = x + 1
    dropout(own, 0.5, training=False).mul_(3.0)
    return own + 1


@pytest.mark.parametrize(
    "function",
    [
        input_written,
        a_part_of_an_input_written,
        the_whole_used_later,
        through_an_unmarked_view,
        through_an_idle_dropout,
    ],
)
def test_what_others_could_see_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ConfigError, match="writes in place"):
        capture_model(Applied(function), {"x": torch.randn(3, 4)})
