"""Replace windows by masked full attention in plain operators, where no form skips the rest.

Before::

    %3 = ditfastattn.window_attention.default(%0, %1, %2, 2, 0.35): float32[2, 2, 16, 8]

After::

    %4 = aten.scaled_dot_product_attention.default(%0, %1, %2, %seen, ..., scale=0.35)
    %5 = aten.transpose.int(%4, 1, 2); aten.contiguous; aten.transpose.int

A graph that leaves Python cannot keep the operators: they are known to this library alone.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from ditfastattn.passes.graph.ir import calls, value
from ditfastattn.passes.graph.paste_form import (
    Form,
    FormPaster,
    is_masked,
    sources,
    token_major,
)
from ditfastattn.passes.windows.forms import window_of
from ditfastattn.passes.windows.masks import hide_pairs
from ditfastattn.passes.windows.tile_attention import TILE_ATTENTION
from ditfastattn.passes.windows.tile_attention import seen_pairs as pairs_of_tiles
from ditfastattn.passes.windows.window import TileWindow
from ditfastattn.passes.windows.window_attention import (
    WINDOW_ATTENTION,
    rows_of_queries,
    seen_pairs,
)


def mask_windows(module: GraphModule) -> int:
    """Replace every window of ``module`` in place; return how many there were."""
    paster = FormPaster(module)
    known: dict[object, Tensor] = {}
    found = calls(module.graph, WINDOW_ATTENTION, TILE_ATTENTION)
    for node in found:
        window, scale, text = window_of(node)
        query, keys = (value(source) for source in sources(node)[:2])
        key = (window, text, query.shape[2], keys.shape[2], query.device)
        if key not in known:
            if isinstance(window, TileWindow):
                every = pairs_of_tiles(window, *text, query.device)
            else:
                every = seen_pairs(keys.shape[2], window, *text, query.device)
            known[key] = rows_of_queries(every, query.shape[2], text[0])
        form = _masked_form(scale, is_masked(node))
        paster.replace(node, (key, scale, "masked"), form, (known[key],))
    if found:
        module.recompile()
    return len(found)


def _masked_form(scale: float, masked: bool) -> Form:
    def run(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        found = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        return token_major(found)

    def run_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        hidden = hide_pairs(seen, mask)
        return token_major(scaled_dot_product_attention(q, k, v, attn_mask=hidden, scale=scale))

    return run_masked if masked else run
