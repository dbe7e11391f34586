"""Lower every window of a graph, or compute one eagerly, by forms that skip unseen keys."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule

from ditfastattn.passes.windows.band import band_of
from ditfastattn.passes.windows.lower_tile_attention import lower_tile_attention, tiles_form
from ditfastattn.passes.windows.lower_window_attention import (
    WindowKernel,
    blocks_form,
    lower_window_attention,
)
from ditfastattn.passes.windows.window import TileWindow, Window


def lower_windows(module: GraphModule, kernel: WindowKernel = WindowKernel.AUTO) -> list[str]:
    """Lower the windows of ``module`` in place; return why others stay."""
    return [*lower_window_attention(module, kernel), *lower_tile_attention(module)]


def compute_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    text: tuple[int, int],
    mask: Tensor | None = None,
) -> Tensor:
    """Attend within ``window``; q, k and v are ``[B, H, N, D]``, ``text`` keys before and after.

    ``mask`` is ``[B | 1, H | 1, queries | 1, keys]``.
    """
    masked, asks = mask is not None, q.shape[2] == k.shape[2]
    if isinstance(window, TileWindow):
        form, constants = tiles_form(window, scale, text, q.device, masked, text_queries=asks)
    else:
        band = band_of(k.shape[2], window, q.dtype, q.device, *text, text_queries=asks)
        form, constants = blocks_form(band, scale, masked)
    return form(q, k, v, *constants) if mask is None else form(q, k, v, mask, *constants)
