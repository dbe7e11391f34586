"""Windows of models whose masks depend on the query: interpreter, graph and search agree."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention

from ditfastattn import CfgLayout, Strategy, load
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.runtime.reference import _window
from ditfastattn.runtime.search.measure.site_evaluator import SiteEvaluator
from tests.export.helpers import export_tiny
from tests.heads import head_plan, split
from tests.helpers import (
    TinyModel,
    capture_every_site,
    captured_once,
    flat_inputs,
    lanes,
    largest_difference,
    make_plan,
    mixed_strategies,
    noise,
    randomize,
    run_plan,
    timestep,
    uniform_strategies,
)
from tests.tiers import slow_but

HEADS = 4  # as many as there are rows in the batch, which nothing must confuse with it
IMAGE, TEXT = 16, 5
MASKS = ("pairs", "of all rows", "of each head")


class Block(nn.Module):
    """Attend among all tokens, then a feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
        heads = (self.qkv(x) * scale).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + scale * self.out(found.transpose(1, 2).flatten(2))
        added: Tensor = self.second(gelu(self.first(x)))
        return x + scale * added


class Masked(nn.Module):
    """Joint attention over an image and a prompt, by a mask of one of ``MASKS``."""

    def __init__(self, kind: str, width: int = 32) -> None:
        super().__init__()
        self.kind = kind
        self.patches = nn.Conv2d(4, width, 2, stride=2)
        self.words = nn.Linear(12, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.out = nn.ConvTranspose2d(width, 4, 2, stride=2)

    def forward(self, latent: Tensor, timestep: Tensor, prompt: Tensor, words: Tensor) -> Any:
        scale = (1 + timestep / 1000).view(-1, 1, 1)
        patches = self.patches(latent)
        x = torch.cat([patches.flatten(2).transpose(1, 2), self.words(prompt)], dim=1)
        mask = self.mask(pad(words, (IMAGE, 0), value=True))
        for block in self.blocks:
            x = block(x, scale, mask)
        image = x[:, :IMAGE].transpose(1, 2).reshape(patches.shape)
        return (self.out(image),)

    def mask(self, seen: Tensor) -> Tensor:
        """Return the mask of tokens ``seen``, ``[B, N]``: no hidden token attends, nor is seen."""
        pairs = seen[:, None, :, None] & seen[:, None, None, :]
        if self.kind == "pairs":
            return pairs
        distance = (torch.arange(seen.shape[1])[:, None] - torch.arange(seen.shape[1])).abs()
        if self.kind == "of all rows":
            return torch.where(pairs[0, 0], -0.3 * distance, -torch.inf)
        return -distance * torch.linspace(0.1, 1.5, HEADS)[:, None, None]


@functools.cache
def tiny_masked(kind: str) -> TinyModel:
    torch.manual_seed(0)

    def call(step: int, batch: int) -> dict[str, Any]:
        lengths = torch.arange(batch)[:, None] % 3 + 2
        return {
            "latent": lanes(step, batch),
            "timestep": timestep(step, batch),
            "prompt": noise(99, batch, TEXT, 12),
            "words": torch.arange(TEXT) < lengths,
        }

    return TinyModel(randomize(Masked(kind)), call)


@pytest.mark.parametrize("layout", [CfgLayout.COND_FIRST, CfgLayout.UNCOND_FIRST])
@pytest.mark.parametrize("kind", MASKS)
def test_mixed_plans_equal_the_reference(kind: str, layout: CfgLayout) -> None:
    tiny = tiny_masked(kind)
    _, sites = capture_every_site(tiny)
    windowed = [site for site in sites if site.windows]
    assert [(site.kind, site.text) for site in windowed] == [(SiteKind.JOINT, (0, TEXT))] * 2
    for strategy in (Strategy.WINDOW, Strategy.WINDOW_SHARE_CFG):
        strategies = uniform_strategies(sites, strategy)
        expected = tiny.reference(strategies, sites, layout)
        found = run_plan(tiny, make_plan(tiny, strategies, layout, feed_forwards=True))
        assert largest_difference(found, expected) < 1e-5
        assert all(bool(item.isfinite().all()) for item in expected)
        assert largest_difference(expected, tiny.run(tiny.model)) > 1e-3


@pytest.mark.parametrize(
    ("kind", "count"),
    slow_but(
        {("pairs", 2), ("of each head", 4)}, [(kind, count) for kind in MASKS for count in (2, 4)]
    ),
)
def test_groups_of_heads_equal_the_reference(kind: str, count: int) -> None:
    tiny = tiny_masked(kind)
    sites = split(tiny, count).every
    rows = mixed_strategies(sites, seed=count)
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    found = run_plan(tiny, head_plan(tiny, count, rows))
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("kind", MASKS)
def test_a_search_tries_the_windows_of_the_reference(kind: str) -> None:
    tiny = tiny_masked(kind)
    found = captured_once(tiny)
    site = found.sites[0]
    evaluator = SiteEvaluator(found.graph, found.sites, CfgLayout.COND_FIRST)
    with torch.no_grad():
        environment = evaluator.begin(flat_inputs(tiny, 0))
        evaluator.advance(environment, 0)
        names = ("query", "key", "value", "attn_mask")
        node = next(node for node in found.graph.module.graph.nodes if node.name == site.node)
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        call = {name: environment[given[name]] for name in names}
        full = scaled_dot_product_attention(**call)
        for window in site.windows:
            expected = full - _window(replace(site, window=window), call)
            residual = evaluator.residual(environment, 0, full, window)
            torch.testing.assert_close(residual, expected, rtol=0, atol=1e-5)
        evaluator.memory[0].residual = torch.zeros_like(full)
        half = {name: item if name == "attn_mask" else item[:2] for name, item in call.items()}
        if kind == "pairs":
            half["attn_mask"] = call["attn_mask"][:2]
        expected = torch.cat([_window(site, half)] * 2)
        shared = evaluator.attend(environment, 0, Strategy.WINDOW_SHARE_CFG)
    torch.testing.assert_close(shared, expected, rtol=0, atol=1e-5)


def test_a_bundle_equals_the_reference(tmp_path: Path) -> None:
    tiny = tiny_masked("pairs")
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, Strategy.WINDOW_SHARE_CFG)
    export_tiny(tiny, rows, tmp_path)
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    bundle = load(tmp_path)
    assert largest_difference(tiny.run(bundle), expected) < 1e-4
