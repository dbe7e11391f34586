"""The original DiT, and timm's blocks, as people copy them: whole models without a library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

from ditfastattn import CfgLayout, Plan, Strategy
from ditfastattn.passes.analysis.fingerprint import fingerprint
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.legality import declined_strategies
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.schema import Sampler
from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.runtime.matching import input_shapes
from ditfastattn.runtime.reference import PlanInterpreter
from tests.helpers import (
    STEPS,
    TIMESTEPS,
    Capture,
    capture_call,
    lanes,
    largest_difference,
    mixed_strategies,
    randomize,
    timestep,
)

WIDTH, HEADS, DEPTH, PATCH, SIDE = 16, 2, 2, 2, 8
TOKENS = (SIDE // PATCH) ** 2
BATCH = 4


class Attention(nn.Module):
    """timm's attention: one projection, permuted and unbound; fused, or product by product."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.scale = fused, (WIDTH // HEADS) ** -0.5
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.1)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            x = scaled_dot_product_attention(q, k, v)
        else:
            weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
            x = self.attn_drop(weights) @ v
        x = self.proj(x.transpose(1, 2).reshape(batch, tokens, width))
        dropped: Tensor = self.proj_drop(x)
        return dropped


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.act, self.drop = nn.GELU(approximate="tanh"), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return result


class AdaLNZeroBlock(nn.Module):
    """The original DiT's block."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(fused), Mlp()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            c
        ).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(x, shift_msa, scale_msa))
        result: Tensor = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(x, shift_mlp, scale_mlp))
        return result


class LayerScaleBlock(nn.Module):
    """timm's block, ``x * ls`` after each branch; the conditions are added to its tokens."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(fused), Mlp()
        self.ls1, self.ls2 = (nn.Parameter(torch.rand(WIDTH)) for _ in range(2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + c.unsqueeze(1)
        x = x + self.attn(self.norm1(x)) * self.ls1
        result: Tensor = x + self.mlp(self.norm2(x)) * self.ls2
        return result


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiT(nn.Module):
    """Patches with positions, timestep and class, blocks, the final layer, and no patches again."""

    def __init__(self, block: Callable[[bool], nn.Module], fused: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, WIDTH, PATCH, PATCH)
        self.pos_embed = nn.Parameter(torch.randn(1, TOKENS, WIDTH), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.labels = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList([block(fused) for _ in range(DEPTH)])
        self.final = nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, PATCH * PATCH * 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.pos_embed
        frequencies = torch.exp(-math.log(10000) * torch.arange(4, dtype=torch.float32) / 4)
        angles = t[:, None].float() * frequencies[None]
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.labels(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final(silu(c)).chunk(2, dim=1)
        x = self.head(modulate(x, shift, scale))
        x = x.reshape(len(x), SIDE // PATCH, SIDE // PATCH, PATCH, PATCH, 8)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), 8, SIDE, SIDE)


class GuidedDiT(DiT):
    """The same with guidance inside, as the original samples."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        half = x[: len(x) // 2]
        out = super().forward(torch.cat([half, half], dim=0), t, y)
        eps, rest = out[:, :3], out[:, 3:]
        conditional, unconditional = torch.split(eps, len(eps) // 2, dim=0)
        guided = unconditional + 4.0 * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided], dim=0), rest], dim=1)


def call(step: int) -> dict[str, Any]:
    labels = torch.tensor([1, 2, 10, 10])
    return {"x": lanes(step, BATCH, SIDE), "t": timestep(step, BATCH), "y": labels}


def plan_of(found: Capture, rows: list[tuple[Strategy, ...]]) -> Plan:
    return Plan(
        model=fingerprint(found.graph, found.every, found.static),
        inputs=input_shapes(found.graph),
        sampler=Sampler(steps=STEPS, timesteps=TIMESTEPS, cfg_layout=CfgLayout.COND_FIRST),
        sites=tuple(planned_site(site) for site in found.every),
        strategies=tuple(rows),
        calibration=Calibration(method="manual"),
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("block", [AdaLNZeroBlock, LayerScaleBlock])
@pytest.mark.parametrize("whole", [DiT, GuidedDiT])
def test_a_mixed_plan_on_a_hand_written_dit_is_the_interpreters(
    whole: type[DiT], block: type[nn.Module], fused: bool
) -> None:
    torch.manual_seed(0)
    made, twin = randomize(whole(block, fused)), whole(block, True).eval()
    twin.load_state_dict(made.state_dict())
    found = capture_call(made, call(0))
    assert [(site.name, site.kind) for site in found.every] == [
        pair
        for index in range(DEPTH)
        for pair in (
            (f"blocks.{index}.attn", SiteKind.SELF),
            (f"blocks.{index}.mlp", SiteKind.FEED_FORWARD),
        )
    ]
    attentions = found.sites
    assert [(site.heads, site.tokens) for site in attentions] == [(HEADS, TOKENS)] * DEPTH
    assert all(not declined_strategies(site) for site in attentions)
    drawn = (mixed_strategies(found.every, seed) for seed in range(50))
    rows = next(rows for rows in drawn if {s for row in rows for s in row} == set(strategies()))
    options: dict[str, Any] = {"plan": plan_of(found, rows), "lowering": "eager", "timestep": "t"}
    torch._dynamo.reset()
    planned = torch.compile(made, backend="ditfastattn", fullgraph=True, options=options)
    # The interpreter intercepts calls of attention: it runs the twin that makes them.
    interpreter = PlanInterpreter(
        twin, rows, capture_call(twin, call(0)).every, CfgLayout.COND_FIRST
    )
    expected, got, dense = [], [], []
    with torch.no_grad():
        for step in range(STEPS):
            with interpreter.step(step):
                expected.append(twin(**call(step)))
            got.append(planned(**call(step)))
            dense.append(made(**call(step)))
    assert largest_difference(got, expected) < 1e-5
    assert largest_difference(got, dense) > 1e-3
