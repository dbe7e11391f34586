"""Routed experts run on all tokens: the graph computes what the module does, or there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ditfastattn.passes.capture.opaque_blocks import OpaqueBlock
from ditfastattn.passes.capture.routed_experts import form_of
from ditfastattn.passes.graph.ir import aten, calls

WIDTH, EXPERTS = 8, 4


class Expert(nn.Module):
    """Compute each token alone; or, where ``mixing``, of all tokens that it gets."""

    def __init__(self, *, mixing: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.mixing = mixing

    def forward(self, x: Tensor) -> Tensor:
        if self.mixing:
            x = x + x.mean(dim=0, keepdim=True)
        found: Tensor = self.down(nn.functional.silu(self.up(x)))
        return found


class Routed(nn.Module):
    """Run experts on their runs of the sorted tokens, as DeepSeek's code and HiDream's do."""

    def __init__(self, chosen: int, reduce: str = "sum", *, mixing: bool = False) -> None:
        super().__init__()
        self.chosen, self.reduce = chosen, reduce
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Expert(mixing=mixing) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, experts = self.gate(flat).softmax(-1).topk(self.chosen, sorted=False)
        order = experts.flatten().argsort()
        ends = experts.flatten().bincount().cumsum(0).tolist()
        total = torch.zeros_like(flat)
        for expert, start, end in zip(self.experts, [0, *ends], ends, strict=False):
            if start == end:
                continue
            tokens = (order // self.chosen)[start:end]
            found = expert(flat[tokens]) * weights.view(-1, 1)[order[start:end]]
            places = tokens.view(-1, 1).repeat(1, WIDTH)
            total.scatter_reduce_(0, places, found, reduce=self.reduce)
        return total.view_as(x)


def opaque(module: nn.Module) -> OpaqueBlock:
    torch.manual_seed(0)
    block = OpaqueBlock(module, "blocks.0.moe")
    block.call(module, (torch.randn(2, 12, WIDTH),), {})
    return block


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_experts_on_all_tokens_compute_the_same(chosen: int) -> None:
    module = Routed(chosen)
    form = form_of(opaque(module).name)
    assert not calls(form.graph, aten.argsort.default)
    for seed, expert in enumerate([None, 0, EXPERTS - 1]):
        if expert is not None:
            with torch.no_grad():
                module.gate.bias[expert] = -100.0  # no token goes there
        x = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            (found,) = form(x, *module.parameters())
            torch.testing.assert_close(found, module(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Routed(2, mixing=True), "with every expert on all tokens it computes something else"),
        (Routed(2, "amax"), "what experts return is combined by amax"),
        (Expert(mixing=False), "no tokens are sorted by expert, each of which gets some"),
    ],
    ids=["experts that mix tokens", "the largest result", "no router"],
)
def test_other_modules_have_no_such_graph(module: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        form_of(opaque(module).name)
