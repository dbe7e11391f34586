"""Time one compiled attention layer under each strategy: the paper's Table 2.

    python -m ditfastattn.tools.benchmark_attention --tokens 4096 --out benchmarks/attention

The layer is the residual branch of a DiT block: projections, attention, output projection and gate,
on two guidance halves. ``full, storing`` is a full step that also stores the residual and the
output for later steps. Windows by tiles of the sequence are timed too and, if the tokens form a
square, by tiles of the square. A profile of each attributes its time to operators; the rest is what
Inductor fused. The kernels are also timed alone: those of a band, with and without the bias that
masks what is outside it, and those of tiles of the sequence.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.fx import GraphModule

from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.capture.dynamo import capture, describe_inputs
from ditfastattn.passes.graph.slots import read_slots
from ditfastattn.passes.plan.actions import SiteAction
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.strategies import Strategy, strategies
from ditfastattn.passes.rewrites.pipeline import rewrite
from ditfastattn.passes.windows.band import band_bias, band_of
from ditfastattn.passes.windows.forms import sequence_tiles, tiles
from ditfastattn.passes.windows.lower_windows import compute_window
from ditfastattn.passes.windows.window import TileWindow, Window
from ditfastattn.runtime.lowering import Lowering, lower
from ditfastattn.runtime.search.measure.timing import measure_turns
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import open_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

GUIDED_BATCH = 2  # the conditional and the unconditional half of one image
STORING = "full, storing"
REST = "fused and the rest"
_PROFILED = 10


class Branch(nn.Module):
    """Add gated self-attention to ``[B, N, C]``."""

    def __init__(self, heads: int, head_dim: int) -> None:
        """Make the projections."""
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return ``x`` plus the branch; ``gate`` is ``[B, 1, C]``."""
        batch, tokens, width = x.shape
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        branch: Tensor = self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + gate * branch


def captured_branch(module: nn.Module, x: Tensor, gate: Tensor) -> tuple[CapturedGraph, Any]:
    """Return the captured graph of one call, and its flat inputs."""
    found: list[tuple[CapturedGraph, Any]] = []

    def backend(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        inputs = describe_inputs(graph)

        def run(*args: Any) -> Any:
            found.append((capture(graph, inputs, args), args))
            return graph(*args)

        return run

    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(x, gate)
    return found[0]


@app.command()
def run(
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of the layer.")] = 4096,
    heads: Annotated[int, typer.Option(min=1, help="Heads of the attention.")] = 6,
    head_dim: Annotated[int, typer.Option(min=8, help="Channels of a head.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    repetitions: Annotated[int, typer.Option(min=10, help="Timed calls of each.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("benchmarks/attention"),
) -> None:
    """Time the strategies in turns, and print their ratios to full attention."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    branch = Branch(heads, head_dim).to(device, kind).eval()
    x = torch.randn(GUIDED_BATCH, tokens, heads * head_dim, device=device, dtype=kind)
    gate = torch.randn(GUIDED_BATCH, 1, heads * head_dim, device=device, dtype=kind)
    captured, args = captured_branch(branch, x, gate)
    (site,) = find_sites(captured).sites
    forms = _tile_forms(tokens)
    calls = {
        name: _compiled(captured, args, acted, action, name)
        for name, (acted, action) in _actions(site, forms).items()
    }
    full, *others = calls
    pairs = measure_turns(calls[full], [calls[name] for name in others], repetitions)
    timings = {full: pairs[0].baseline}
    timings |= {name: pair.candidate for name, pair in zip(others, pairs, strict=True)}
    ratios = {name: 1.0 / pair.speedup.median for name, pair in zip(others, pairs, strict=True)}
    data = {
        "machine": machine(),
        "arguments": {"tokens": tokens, "heads": heads, "head_dim": head_dim, "dtype": dtype},
        "window_per_side": site.window,
        "tiles": {form: str(window) for form, window in forms.items()},
        "ratio_to_full": ratios,
        "kernel_ratio_to_full": _kernels(x, heads, site.window, repetitions),
        "profile_seconds": {name: _profile(calls[name], device) for name in calls},
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
    }
    path = out / f"{device}-{tokens}-{dtype}.json"
    write_text_atomically(path, json.dumps(data, indent=1) + "\n")
    open_console().print_json(data=ratios)


def _tile_forms(tokens: int) -> dict[str, TileWindow]:
    """Return the windows by tiles that fit: of the sequence, and of a square of tokens."""
    forms = {"by tiles of the sequence": sequence_tiles(tokens)}
    side = math.isqrt(tokens)
    if side**2 == tokens:
        forms["by tiles"] = tiles((side, side))
    return {form: window for form, window in forms.items() if window is not None}


def _actions(site: Site, forms: Mapping[str, TileWindow]) -> dict[str, tuple[Site, SiteAction]]:
    """Return what to time, full attention first: the site, its window, and what it does."""
    actions = {
        strategy.name: SiteAction(strategy)
        for strategy in strategies()
        if not strategy.extrapolates
    }
    actions[STORING] = SiteAction(Strategy.FULL, writes_output=True, writes_residual=True)
    found = {name: (site, action) for name, action in actions.items()}
    with_window = [name for name in actions if "window" in name or name == STORING]
    for form, window in forms.items():
        by_tiles = replace(site, window=window)
        found |= {f"{name}, {form}": (by_tiles, actions[name]) for name in with_window}
    return found


def _compiled(
    captured: CapturedGraph, args: Sequence[Tensor], site: Site, action: SiteAction, name: str
) -> Callable[[int], None]:
    """Return a warm call of the layer in which ``site`` does ``action``."""
    module = rewrite(captured, (site,), (action,), CfgLayout.COND_FIRST, name)
    slots = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")][len(args) :]
    assert len(slots) == len(read_slots(module.graph))
    caches = [torch.randn(slot.shape, dtype=slot.dtype, device=args[0].device) for slot in slots]
    inputs = [*args, *caches]
    call = partial(_once, lower(module, inputs, Lowering.INDUCTOR, {}), inputs)
    for _ in range(3):
        call(0)
    return call


def _kernels(x: Tensor, heads: int, window: Window, repetitions: int) -> dict[str, float]:
    """Return the time of a band's kernels and of tiles' kernels, and the products they compute.

    All are ratios to the kernel of full attention with as many heads and tokens.
    """
    assert isinstance(window, int)
    batch, tokens, width = x.shape
    band = band_of(tokens, window, x.dtype, x.device)
    head_dim, rows = width // heads, batch * heads

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, head_dim, dtype=x.dtype, device=x.device)

    whole = [some(batch, heads, tokens) for _ in range(3)]
    near = [some(band.blocks, rows, size) for size in (band.block, band.span, band.span)]
    bias = band_bias(band)

    def attend(tensors: Sequence[Tensor], mask: Tensor | None, _: int) -> None:
        q, k, v = tensors
        nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def in_tiles(tiled: TileWindow, _: int) -> None:
        q, k, v = whole
        compute_window(q, k, v, tiled, head_dim**-0.5, (0, 0))

    calls = {
        "blocks": partial(attend, near, bias),
        "blocks without the bias": partial(attend, near, None),
    }
    tiled = sequence_tiles(tokens)
    if tiled is not None:
        calls["tiles of the sequence"] = partial(in_tiles, tiled)
    with torch.no_grad():
        for warm in (partial(attend, whole, None), *calls.values()):
            warm(0)
        timings = measure_turns(partial(attend, whole, None), list(calls.values()), repetitions)
    found = {name: 1.0 / pair.speedup.median for name, pair in zip(calls, timings, strict=True)}
    products = {"products of blocks": band.blocks * band.block * band.span / tokens**2}
    if tiled is not None:
        products["products of tiles of the sequence"] = tiled.seen / tokens
    return products | found


def _profile(call: Callable[[int], None], device: str) -> dict[str, float]:
    """Return the seconds that one call spends in each heavy operator, and in the rest."""
    began = time.perf_counter()
    with torch.profiler.profile() as profiler:
        for _ in range(_PROFILED):
            call(0)
    whole = (time.perf_counter() - began) / _PROFILED
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        taken = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        found[event.key] = taken * 1e-6 / _PROFILED
    # On the CPU these are operators' own times; the compiled graph's own is its fused loops.
    named = {name: seconds for name, seconds in found.items() if device != "cpu" or "::" in name}
    heavy = {name: seconds for name, seconds in named.items() if seconds > 0.01 * whole}
    return {**heavy, REST: whole - sum(heavy.values())}


def _once(run: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor], _: int) -> None:
    with torch.no_grad():
        run(inputs)


if __name__ == "__main__":
    app()
