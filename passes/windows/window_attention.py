"""Define ``ditfastattn::window_attention``: self-attention over a band around the diagonal.

Query ``i`` attends the keys ``j`` with ``|i - j| <= window``. Where text tokens stand ``before`` or
``after`` the image's, as in joint attention, the band is the image's alone: every query attends the
text, and the text's queries attend everything (the arrow of DiTFastAttnV2, section 3.2). Where text
tokens are keys alone, the queries are the image's, and fewer than the keys by the text. A mask
hides keys from every query, as padding does, or pairs of query and key; a query that sees no key
gives 0. The operator marks
the window in a graph and computes it as masked full attention; ``lower_window_attention`` replaces
it by forms that skip the work outside the band.

The result lies in memory as ``[B, N, H, D]``, like that of flash attention, so that moving and
merging the heads, which models do next, stays a view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import register_flop_formula

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.windows.masks import check_mask, hide_pairs


@torch.library.custom_op("ditfastattn::window_attention", mutates_args=())
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    before: int = 0,
    after: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend from each query of ``q`` to the keys at most ``window`` tokens away.

    Takes and returns ``[B, H, N, D]``. The first ``before`` and the last ``after`` keys are the
    text's, which all attend; so are those queries, which attend all, unless ``q`` lacks them.
    ``mask``, ``[B | 1, H | 1, queries | 1, keys]``, is false at hidden pairs, or is added to the
    scores.

    Raises:
        ConfigError: the inputs differ, the window is negative, or the mask does not fit.
    """
    _check(q, k, v, window, before + after, mask)
    every = seen_pairs(k.shape[2], window, before, after, q.device)
    seen = hide_pairs(rows_of_queries(every, q.shape[2], before), mask)
    result = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return allocate(q).copy_(result)


@window_attention.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    before: int = 0,
    after: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    _check(q, k, v, window, before + after, mask)
    return allocate(q)


def seen_pairs(
    tokens: int, window: int, before: int, after: int, device: torch.device | None = None
) -> Tensor:
    """Return which (query, key) pairs are kept, bool ``[tokens, tokens]``."""
    position = torch.arange(tokens, device=device)
    text = (position < before) | (position >= tokens - after)
    near = (position[:, None] - position[None, :]).abs() <= window
    return near | text[:, None] | text[None, :]


def rows_of_queries(seen: Tensor, queries: int, before: int) -> Tensor:
    """Return the rows of ``[tokens, tokens]`` that are queries: all, or those of the image."""
    return seen.narrow(0, before if queries < len(seen) else 0, queries)


WINDOW_ATTENTION = torch.ops.ditfastattn.window_attention.default


def allocate(q: Tensor) -> Tensor:
    """Return an uninitialized ``[B, H, N, D]`` that lies in memory as ``[B, N, H, D]``."""
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


def check_alike(q: Tensor, k: Tensor, v: Tensor, text: int, where: str) -> None:
    """Raise ``ConfigError`` unless all are ``[B, H, N, D]`` of one shape, dtype and device.

    Keys and values may have ``text`` more tokens than the query.
    """
    if q.dim() != 4:
        raise ConfigError(
            "the query has the wrong rank",
            where=where,
            got=list(q.shape),
            expected="[batch, heads, tokens, head_dim]",
        )
    sizes = list(q.shape)
    if k.dim() == 4 and k.shape[2] == q.shape[2] + text:
        sizes[2] = k.shape[2]
    expected = sizes, q.dtype, q.device
    for name, tensor in (("key", k), ("value", v)):
        got = list(tensor.shape), tensor.dtype, tensor.device
        if got != expected:
            raise ConfigError(
                f"query and {name} differ",
                where=where,
                got=got,
                expected=expected,
                remedy="a window is for self-attention without grouped heads",
            )


def _check(q: Tensor, k: Tensor, v: Tensor, window: int, text: int, mask: Tensor | None) -> None:
    check_alike(q, k, v, text, "window_attention")
    check_mask(q, k, mask, "window_attention")
    if window < 0:
        raise ConfigError(
            "the window is negative", where="window_attention", got=window, expected="0 or more"
        )


def kept_pairs(queries: int, keys: int, window: int, text: int = 0) -> int:
    """Count the pairs kept: those in the band of ``keys - text``, and all with a text token."""
    image = keys - text
    width = min(window, image - 1)
    near = image * (2 * width + 1) - width * (width + 1)
    return near + image * text + (queries - image) * keys


@register_flop_formula(torch.ops.ditfastattn.window_attention)
def _flops(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    window: int,
    scale: float,
    before: int = 0,
    after: int = 0,
    mask: torch.Size | None = None,
    **_: Any,
) -> int:
    """Count scores and weighted sum, a multiply and an add each, of the kept pairs alone."""
    batch, heads, queries, head_dim = q
    return 4 * batch * heads * head_dim * kept_pairs(queries, k[2], window, before + after)
