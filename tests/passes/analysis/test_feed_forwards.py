"""Feed-forward branches are found by data flow, gated or adapted; embedders are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

from ditfastattn import Strategy
from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.plan.legality import declined_strategies, why_not
from tests.helpers import TINY_MODELS, capture_every_site, capture_model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dit", [f"transformer_blocks.{i}.ff.net" for i in range(3)]),
        ("pixart", [f"transformer_blocks.{i}.ff.net" for i in range(2)]),
        (
            "sd3",
            [
                *("transformer_blocks.0.ff.net", "transformer_blocks.0.ff_context.net"),
                *("transformer_blocks.1.ff.net", "transformer_blocks.1.ff_context.net"),
                "transformer_blocks.2.ff.net",
            ],
        ),
    ],
)
def test_every_block_has_its_feed_forward_and_no_embedder_is_one(
    name: str, expected: list[str]
) -> None:
    captured, sites = capture_every_site(TINY_MODELS[name]())
    found = [site for site in sites if site.kind is SiteKind.FEED_FORWARD]
    assert [site.name for site in found] == expected
    assert all(site.window == 0 and site.exits == (site.node,) for site in found)
    windowed = {"window", "window+share-cfg", "share-cfg+refresh"}  # or for a later window
    assert all(set(map(str, declined_strategies(site))) == windowed for site in found)
    order = [node.name for node in captured.module.graph.nodes]
    places = [order.index(site.node) for site in sites]
    assert places == sorted(places)


class Block(nn.Module):
    """Attend, then feed forward in one of several forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.low, self.high = nn.Linear(16, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        heads = x.unsqueeze(1)
        if self.form != "no attention":
            x = x + scaled_dot_product_attention(heads, heads, heads).squeeze(1)
        x = x * timestep.view(-1, 1, 1)
        hidden = self.up(x)
        if self.form == "gated":
            hidden = silu(self.gate(x)) * hidden
        elif self.form == "split":
            first, second = hidden.chunk(2, dim=-1)
            hidden = torch.cat([gelu(first), second], dim=-1)
        elif self.form == "modulated inside":
            hidden = gelu(hidden) * timestep.view(-1, 1, 1)
        elif self.form != "linear":
            hidden = gelu(hidden)
        branch: Tensor = self.down(hidden)
        if self.form == "adapted":
            branch = branch + 0.5 * self.high(self.low(hidden))
        if self.form == "no norm":
            return x + branch
        if self.form == "norm after":
            return layer_norm(x + branch, (8,))
        if self.form == "gated after":
            return x * branch
        return x + timestep.view(-1, 1, 1) * branch


def feed_forwards(form: str) -> list[Site]:
    call = {"x": torch.randn(2, 16, 8), "timestep": torch.ones(2)}
    sites = find_sites(capture_model(Block(form), call)).sites
    return [site for site in sites if site.kind is SiteKind.FEED_FORWARD]


@pytest.mark.parametrize("form", ["plain", "gated", "split", "adapted"])
def test_forms_of_a_feed_forward(form: str) -> None:
    (site,) = feed_forwards(form)
    assert (site.tokens, site.heads, site.head_dim) == (16, 1, 8)
    assert not why_not(Strategy.SHARE_CFG, site)
    assert site.node.startswith("add" if form == "adapted" else "linear")


@pytest.mark.parametrize("form", ["no norm", "norm after", "gated after"])
def test_what_joins_the_input_around_a_feed_forward_is_no_part_of_it(form: str) -> None:
    (site,) = feed_forwards(form)
    assert site.node.startswith("linear")
    assert site.exits == (site.node,)


@pytest.mark.parametrize("form", ["linear", "no attention", "modulated inside"])
def test_near_misses(form: str) -> None:
    assert feed_forwards(form) == []
