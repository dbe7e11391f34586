"""Plain PyTorch transformers: every spelling of attention becomes a site that takes a plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from ditfastattn import CfgLayout, Plan, Strategy
from ditfastattn.passes.analysis.fingerprint import fingerprint
from ditfastattn.passes.analysis.site import SiteKind, attentions
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.graph.ir import ATTENTION, calls
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.legality import declined_strategies, why_not
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.schema import Sampler
from ditfastattn.runtime.matching import input_shapes
from tests.helpers import (
    TIMESTEPS,
    Capture,
    TinyModel,
    capture_call,
    largest_difference,
    mixed_strategies,
    noise,
    timestep,
)

WIDTH, HEADS, TOKENS = 16, 2, 16
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, H, N, D] each


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q * float(q.shape[-1] ** -0.5), k.transpose(-2, -1))
    return scores.softmax(dim=-1) @ v


def scaled_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return torch.matmul(torch.softmax(scores.float(), -1).to(q.dtype), v)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, tokens, head_dim = q.shape
    q, k, v = (item.reshape(batch * heads, tokens, head_dim) for item in (q, k, v))
    nothing = torch.empty(batch * heads, tokens, tokens)
    scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=head_dim**-0.5)
    return torch.bmm(scores.softmax(-1), v).reshape(batch, heads, tokens, head_dim)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (item.transpose(1, 2) for item in (q, k, v))  # [B, N, H, D]
    scores = torch.einsum("b n h d, b m h d -> b h n m", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).transpose(1, 2)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, attend: Attend, rotate: bool, key_heads: int) -> None:
        super().__init__()
        self.attend, self.rotate, self.key_heads = attend, rotate, key_heads
        width = WIDTH // HEADS
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * key_heads * width)
        self.norm_q, self.norm_k = nn.LayerNorm(width), nn.LayerNorm(width)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        split = self.qkv(x).view(batch, tokens, HEADS + 2 * self.key_heads, -1).transpose(1, 2)
        q, k, v = split.split([HEADS, self.key_heads, self.key_heads], dim=1)
        q, k = self.norm_q(q), self.norm_k(k)
        if self.rotate:
            angles = torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
            q, k = rotated(q, angles), rotated(k, angles)
        if self.attend is not grouped:
            k, v = (item.repeat_interleave(HEADS // self.key_heads, dim=1) for item in (k, v))
        result: Tensor = self.proj(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))
        return result


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Packed(nn.Module):
    """PyTorch's own multi-head attention."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return result


class Spelled(nn.Module):
    """What ``Packed`` computes, by its parameters, as the reference interpreter can see it."""

    def __init__(self, need_weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.attention.in_proj_weight.chunk(3)
        biases = self.attention.in_proj_bias.chunk(3)
        q, k, v = (
            linear(x, w, b).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
            for w, b in zip(weights, biases, strict=True)
        )
        merged = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        out: Tensor = self.attention.out_proj(merged)
        return out


class PlainDiT(nn.Module):
    """Three adaptive-norm blocks over tokens, as people write them by hand."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList([make() for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(3)])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor]:
        shift = self.time(timestep[:, None].float() / 1000.0)[:, None]
        x = self.embed(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x) + shift)
        return (self.head(x),)


def call(step: int, batch: int) -> dict[str, Any]:
    lanes = noise(step, batch // 2, TOKENS, 4).repeat(2, 1, 1)
    lanes[batch // 2 :] += 0.1  # guidance: the halves differ
    return {"x": lanes, "timestep": timestep(step, batch)}


def plain(make: Callable[[], nn.Module]) -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(PlainDiT(make).eval(), call)


def of(attend: Attend, rotate: bool = False, key_heads: int = HEADS) -> Callable[[], nn.Module]:
    return lambda: Attention(attend, rotate, key_heads)


@pytest.fixture(autouse=True)
def same_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lanes of these models differ by a constant, where a pipeline's differ by conditions."""
    monkeypatch.setattr("ditfastattn.runtime.generation.check_halves", lambda *_: None)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "matmul": (of(matmul), of(fused)),
    "scaled scores, fp32 softmax": (of(scaled_scores), of(fused)),
    "heads folded into the batch": (of(folded), of(fused)),
    "einsum": (of(einsum), of(fused)),
    "rotary positions": (of(matmul, rotate=True), of(fused, rotate=True)),
    "repeated keys": (of(matmul, key_heads=1), of(fused, key_heads=1)),
    "grouped queries": (of(grouped, key_heads=1), of(fused, key_heads=1)),
    "nn.MultiheadAttention": (lambda: Packed(need_weights=False), Spelled),
    "nn.MultiheadAttention, weights unused": (lambda: Packed(need_weights=True), Spelled),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mixed_plan_on_a_plain_model_is_the_interpreters_on_its_fused_twin(name: str) -> None:
    made, twin = (plain(make) for make in CASES[name])
    twin.model.load_state_dict(made.model.state_dict())
    found = capture_call(made.model, made.call(0, 4))
    assert [site.kind for site in found.sites] == [SiteKind.SELF] * 3
    assert [site.heads for site in found.sites] == [HEADS] * 3
    assert all(not declined_strategies(site) for site in found.sites)
    rows = mixed_strategies(found.sites)
    plan = plan_of(found, rows)
    torch._dynamo.reset()
    options: dict[str, Any] = {"plan": plan, "lowering": "eager"}
    compiled = torch.compile(made.model, backend="ditfastattn", fullgraph=True, options=options)
    seen = capture_call(twin.model, twin.call(0, 4)).sites  # calls the interpreter intercepts
    expected = twin.reference(rows, seen, CfgLayout.COND_FIRST)
    assert largest_difference(made.run(compiled), expected) < 1e-5


def test_the_interpreter_refuses_sites_it_cannot_see() -> None:
    tiny = plain(of(matmul))
    found = capture_call(tiny.model, tiny.call(0, 4))
    with pytest.raises(ValueError, match=r"blocks\.0, blocks\.1, blocks\.2; interpret a twin"):
        tiny.reference(mixed_strategies(found.sites), found.sites, CfgLayout.COND_FIRST)


def plan_of(found: Capture, rows: list[tuple[Strategy, ...]]) -> Plan:
    return Plan(
        model=fingerprint(found.graph, found.every, found.static),
        inputs=input_shapes(found.graph),
        sampler=Sampler(steps=len(rows), timesteps=TIMESTEPS, cfg_layout=CfgLayout.COND_FIRST),
        sites=tuple(planned_site(site) for site in found.sites),
        strategies=tuple(rows),
        calibration=Calibration(method="manual"),
    )


def masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)).masked_fill(torch.eye(q.shape[2], dtype=torch.bool), -1e4)
    return scores.softmax(-1) @ v


def shown_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return weights @ v + weights.mean()


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.relu() @ (k.relu().transpose(-2, -1) @ v)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (masked_fill, "stands between its product and its softmax"),
        (shown_weights, "also used elsewhere"),
        (linear_attention, "linear attention"),
    ],
)
def test_what_is_not_recognized_is_reported_with_the_reason(attend: Attend, reason: str) -> None:
    tiny = plain(of(attend))
    found = capture_call(tiny.model, tiny.call(0, 4))
    report = find_sites(found.graph)
    assert attentions(report.sites) == ()
    assert len(report.declined) == 3
    assert all(reason in item.reason for item in report.declined)
    assert [item.name for item in report.declined] == [f"blocks.{index}" for index in range(3)]


def test_an_added_mask_becomes_the_attentions_mask() -> None:
    bias = noise(7, TOKENS, TOKENS)

    def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-2, -1)) * 0.3 + bias).softmax(-1) @ v

    tiny = plain(of(biased))
    found = capture_call(tiny.model, tiny.call(0, 4))
    assert len(calls(found.graph.module.graph, ATTENTION)) == 3
    assert not any("mask" in why_not(Strategy.WINDOW, site) for site in found.sites)
    inputs = [*found.static]
    with torch.no_grad():
        expected = tiny.model(**tiny.call(1, 4))[0]
        static = iter(inputs)
        flat = [
            next(static) if entry.static else tiny.call(1, 4)[entry.name]
            for entry in found.graph.inputs
        ]
        assert torch.allclose(found.graph.module(*flat)[0], expected, atol=1e-5)
