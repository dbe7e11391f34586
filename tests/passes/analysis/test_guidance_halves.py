"""Guidance's halves are told apart in a batch that frames are folded into."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditfastattn import CfgLayout, Strategy
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.ir import ATTENTION, aten, calls, find, value
from ditfastattn.passes.plan.actions import SiteAction
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.rewrites.pipeline import rewrite
from tests.helpers import Capture, TinyModel, capture_call, largest_difference, noise, timestep

FRAMES, TOKENS, WIDTH = 3, 16, 16


class Frames(torch.nn.Module):
    """Attend frame by frame over ``[B, F, N, C]``, frames folded into the batch."""

    def __init__(self, fold: str) -> None:
        super().__init__()
        self.fold = fold
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor]:
        batch, frames, tokens, width = x.shape
        inner = x.transpose(0, 1) if self.fold == "frames outside" else x
        rows = inner.reshape(batch * frames, tokens, width)
        shift = timestep.float().view(-1, 1) / 1000.0
        shift = shift.repeat_interleave(frames, 0) if self.fold == "repeated" else shift.mean()
        rows = rows + (shift[:, None] if self.fold == "repeated" else shift)
        q, k, v = self.qkv(rows).view(-1, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        rows = rows + self.out(attended)
        if self.fold == "frames outside":
            return (rows.reshape(frames, batch, tokens, width).transpose(0, 1),)
        return (rows.reshape(x.shape),)


class SequenceFirst(torch.nn.Module):
    """Attend over ``[B, F, N, C]`` within a stream ``[F * N, B, C]``.

    The output projection lies before its stream is turned, or, with ``within``, behind that.
    """

    def __init__(self, within: bool) -> None:
        super().__init__()
        self.within = within
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor]:
        stream = x.flatten(1, 2).transpose(0, 1).contiguous() + timestep.float().mean() / 1000.0
        rows = stream.permute(1, 0, 2)
        q, k, v = self.qkv(rows).unflatten(2, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.within:
            rows = rows + self.out(attended.permute(1, 0, 2)).permute(1, 0, 2)
            return (rows.reshape(x.shape),)
        stream = stream + self.out(attended).permute(1, 0, 2)
        return (stream.transpose(0, 1).reshape(x.shape),)


def call(step: int, batch: int) -> dict[str, Any]:
    x = noise(step, batch // 2, FRAMES, TOKENS, WIDTH).repeat(2, 1, 1, 1)
    x[batch // 2 :] += 0.1
    return {"x": x, "timestep": timestep(step, batch)}


def tiny(made: Callable[[], torch.nn.Module]) -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(made().eval(), call)


def attention(found: Capture) -> Site:
    (site,) = found.sites
    return site


@pytest.mark.parametrize("layout", [CfgLayout.COND_FIRST, CfgLayout.UNCOND_FIRST])
@pytest.mark.parametrize(
    ("made", "rows"),
    [
        (partial(Frames, "frames inside"), 2 * FRAMES),
        (partial(Frames, "repeated"), 2 * FRAMES),
        (partial(SequenceFirst, within=False), 2),
    ],
    ids=["frames inside", "repeated", "sequence first"],
)
def test_guidance_is_shared(
    made: Callable[[], torch.nn.Module], rows: int, layout: CfgLayout
) -> None:
    """The attention has the ``rows`` of two lanes of four."""
    model = tiny(made)
    found = capture_call(model.model, model.call(0, 4))
    site = attention(found)
    assert not why_not(Strategy.SHARE_CFG, site)
    expected = model.reference([(Strategy.SHARE_CFG,)] * 2, [site], layout)
    module = rewrite(found.graph, [site], (SiteAction(Strategy.SHARE_CFG),), layout)
    (node,) = calls(module.graph, ATTENTION)
    assert value(node).shape[0] == rows
    for step, output in enumerate(expected):
        static = iter(found.static)
        arguments = model.call(step, 4)
        flat = [
            next(static) if entry.static else arguments[entry.name] for entry in found.graph.inputs
        ]
        with torch.no_grad():
            assert largest_difference([module(*flat)[0]], [output]) < 1e-5


@pytest.mark.parametrize("within", [False, True])
def test_an_exit_lies_before_the_batch_is_moved_unless_it_is_moved_back(within: bool) -> None:
    model = tiny(partial(SequenceFirst, within))
    found = capture_call(model.model, model.call(0, 4))
    (name,) = attention(found).exits
    end = find(found.graph.module.graph, name)
    assert end.target is (aten.permute.default if within else aten.linear.default)
    assert value(end).shape == (4, FRAMES * TOKENS, WIDTH)


def test_frames_outside_do_not() -> None:
    """The first half of the rows is the first frames there, not the first lanes."""
    model = tiny(partial(Frames, "frames outside"))
    site = attention(capture_call(model.model, model.call(0, 4)))
    reason = why_not(Strategy.SHARE_CFG, site)
    assert reason == "its batch is 12, the model's 4, in unknown order"
