"""Sites are found by data flow; what is declined says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditfastattn import Strategy
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.analysis.sites import SiteReport, find_sites
from ditfastattn.passes.graph.origin import readable_path
from ditfastattn.passes.plan.legality import declined_strategies, why_not
from tests.helpers import TINY_MODELS, capture_model, capture_sites


def test_dit_sites() -> None:
    _, sites = capture_sites(TINY_MODELS["dit"]())
    assert [site.name for site in sites] == [f"transformer_blocks.{i}.attn1" for i in range(3)]
    assert {(site.kind, site.tokens, site.heads, site.head_dim) for site in sites} == {
        (SiteKind.SELF, 16, 2, 8)
    }
    assert {(site.grid, site.window) for site in sites} == {((4, 4), 2)}
    assert not any(declined_strategies(site) for site in sites)


def test_the_frontier_is_the_output_projection() -> None:
    captured, sites = capture_sites(TINY_MODELS["dit"]())
    nodes = {node.name: node for node in captured.module.graph.nodes}
    for site in sites:
        (member,) = site.exits
        assert nodes[member].target is torch.ops.aten.linear.default
        (user,) = nodes[member].users
        assert user.target is torch.ops.aten.mul.Tensor  # the gate: it depends on the timestep


def test_pixart_tells_self_from_cross_attention() -> None:
    _, sites = capture_sites(TINY_MODELS["pixart"]())
    assert [site.kind for site in sites] == [SiteKind.SELF, SiteKind.CROSS] * 2
    cross = sites[1]
    assert cross.window == 0
    assert "cross-attention" in why_not(Strategy.WINDOW, cross)
    assert not why_not(Strategy.SHARE_CFG, cross)


def test_sd3_joint_attention_has_two_frontiers_but_the_last() -> None:
    _, sites = capture_sites(TINY_MODELS["sd3"]())
    assert {site.kind for site in sites} == {SiteKind.JOINT}
    assert {(site.tokens, site.text, site.window) for site in sites} == {(21, (0, 5), 2)}
    assert [len(site.exits) for site in sites] == [2, 2, 1]  # the last block drops its text


def test_an_odd_batch_cannot_share_guidance() -> None:
    _, sites = capture_sites(TINY_MODELS["dit"](), batch=3)
    assert why_not(Strategy.SHARE_CFG, sites[0]) == "a batch of 3 has no two halves"


class Attention(torch.nn.Module):
    """Attend in ways that a site may or may not take."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.qkv = torch.nn.Linear(16, 48)
        self.out = torch.nn.Linear(16, 16)
        self.table = torch.nn.Parameter(torch.randn(2, 2, 16, 8))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4)
        extra: dict[str, Any] = {}
        if self.case == "causal":
            extra = {"is_causal": True}
        seen = x.sum(-1) > 0
        if self.case == "masked keys":
            extra = {"attn_mask": seen[:, None, None, :].expand(-1, -1, tokens, -1)}
        if self.case == "masked pairs":
            extra = {"attn_mask": seen[:, None, None, :] & seen[:, None, :, None]}
        if self.case == "dropout":
            extra = {"dropout_p": 0.5}
        if self.case == "static":
            q, k, v = self.table, self.table, self.table
        if self.case == "three-dimensional":
            q, k, v = (item.flatten(0, 1) for item in (q, k, v))
        a: Tensor = scaled_dot_product_attention(q, k, v, **extra)
        a = a.reshape(batch, 2, tokens, 8).transpose(1, 2).flatten(2)
        projected: Tensor = self.out(a)
        return x + timestep.view(-1, 1, 1) * projected


def report(case: str, tokens: int = 16) -> SiteReport:
    call = {"x": torch.randn(2, tokens, 16), "timestep": torch.ones(2)}
    return find_sites(capture_model(Attention(case), call))


def test_a_hand_written_module_is_a_site() -> None:
    (site,) = report("plain").sites
    assert (site.kind, site.window, site.grid, declined_strategies(site)) == (
        SiteKind.SELF,
        2,
        (),
        {},
    )


def test_a_mask_of_keys_is_no_hindrance() -> None:
    (site,) = report("masked keys").sites
    assert (site.kind, site.window, declined_strategies(site)) == (SiteKind.SELF, 2, {})


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("dropout", "attention dropout is active: call model.eval()"),
        ("static", "it does not depend on the model's inputs"),
        ("three-dimensional", "its query has 3 dimensions, not [B, H, N, D]"),
    ],
)
def test_declined_attention_has_its_reason(case: str, reason: str) -> None:
    found = report(case)
    assert not found.sites
    assert [declined.reason for declined in found.declined] == [reason]


@pytest.mark.parametrize(
    ("case", "tokens", "reason"),
    [
        ("causal", 16, "the attention is causal"),
        ("plain", 4, "only 4 tokens: a window would save nothing"),
    ],
)
def test_declined_window_has_its_reason(case: str, tokens: int, reason: str) -> None:
    (site,) = report(case, tokens).sites
    assert site.window == 0
    needing = (Strategy.WINDOW, Strategy.WINDOW_SHARE_CFG, Strategy.SHARE_CFG_REFRESH)
    assert declined_strategies(site) == dict.fromkeys(needing, reason)


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['blocks'].0.attn", "blocks.0.attn"),
        ("L['self'].__dict__['_modules']['blocks'].0.attn", "blocks.0.attn"),
        ("L['self']._modules['proj']._parameters['weight']", "proj.weight"),
        ("L['timestep']", "timestep"),
        ("L['conditions']['resolution']", "conditions.resolution"),
    ],
)
def test_paths_are_readable(source: str, path: str) -> None:
    assert readable_path(source) == path
