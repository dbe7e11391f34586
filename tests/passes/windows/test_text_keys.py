"""Windows where text tokens are keys alone: the rows of the image's queries, in every form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from ditfastattn import ConfigError
from ditfastattn.passes.analysis.flops import count_flops
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.ir import ATTENTION, calls
from ditfastattn.passes.windows.band import Band
from ditfastattn.passes.windows.flex_window import FLEX_BLOCK, band_blocks
from ditfastattn.passes.windows.forms import WINDOWED, window_call
from ditfastattn.passes.windows.lower_window_attention import WindowKernel, lower_window_attention
from ditfastattn.passes.windows.lower_windows import compute_window, lower_windows
from ditfastattn.passes.windows.mask_windows import mask_windows
from ditfastattn.passes.windows.window import Window
from ditfastattn.runtime import reference
from tests.passes.windows.test_masks import GRID, ROW, keys_mask, pairs_mask
from tests.passes.windows.test_window_attention import inputs, trace

WINDOWS: dict[str, Window] = {"a band": 20, "tiles": GRID, "a sequence": ROW}
TEXTS = {"before": (7, 0), "after": (0, 7), "both": (3, 4)}
MASKS: dict[str, Callable[[int], Tensor | None]] = {
    "no mask": lambda tokens: None,
    "keys": lambda tokens: keys_mask("bool", 2, tokens),
    "pairs": lambda tokens: pairs_mask("bool", 2, tokens),
    "weights by head": lambda tokens: pairs_mask("float", 2, tokens, 3),
}


def windowed(window: Window, text: tuple[int, int]) -> Callable[..., Tensor]:
    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        target, arguments = window_call(window, 0.25, text, mask)
        result: Tensor = target(q, k, v, *arguments)
        return result

    return model


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_the_op_and_its_forms_are_the_images_rows_of_all(
    window: Window, text: tuple[int, int], kind: str
) -> None:
    tokens = GRID.tokens + sum(text)
    image = slice(text[0], text[0] + GRID.tokens)
    q, k, v = inputs(2, 3, tokens, 16)
    mask = MASKS[kind](tokens)
    model, given = windowed(window, text), [] if mask is None else [mask]
    expected = model(q, k, v, *given)[:, :, image]
    if mask is not None and mask.shape[2] > 1:
        given = [mask[:, :, image]]
    call = [q[:, :, image], k, v, *given]
    exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    exactly(model(*call), expected)
    lowered = trace(model, *call)
    assert lower_windows(lowered) == []
    assert not calls(lowered.graph, *WINDOWED)
    exactly(lowered(*call)[0], expected)
    eager = compute_window(call[0], k, v, window, 0.25, text, *given)
    exactly(eager, expected)
    outside = trace(model, *call)
    assert mask_windows(outside) == 1
    exactly(outside(*call)[0], expected)
    names = ("query", "key", "value", "attn_mask")
    named = dict(zip(names, call, strict=False)) | {"scale": 0.25}
    site = cast(Site, SimpleNamespace(window=window, text=text))
    exactly(reference._window(site, named), expected)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_the_texts_rows_are_neither_counted_nor_computed(window: Window) -> None:
    _, k, v = inputs(2, 3, GRID.tokens + 7, 16)
    q = inputs(2, 3, GRID.tokens, 16)[0]
    text = (7, 0)
    alone, every = trace(windowed(window, text), q, k, v), trace(windowed(window, text), k, k, v)
    of_text = 4 * 2 * 3 * 16 * 7 * (GRID.tokens + 7)
    assert count_flops(alone.graph).attention + of_text == count_flops(every.graph).attention
    for module in (alone, every):
        lower_windows(module)
    assert len(calls(alone.graph, ATTENTION)) == len(calls(every.graph, ATTENTION)) - 1


@pytest.mark.parametrize("text", [(77, 0), (0, 77), (200, 130)])
def test_blocks_of_flex_attention_are_those_of_create_block_mask(text: tuple[int, int]) -> None:
    tokens, window, first = 700, 60, text[0]
    total = tokens + sum(text)

    def kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query + first - key).abs() <= window
        return near | (key < first) | (key >= first + tokens)

    mask = create_block_mask(kept, None, None, tokens, total, device="cpu", BLOCK_SIZE=FLEX_BLOCK)
    band = Band(tokens, window, torch.float32, torch.device("cpu"), *text, text_queries=False)
    dense = mask.to_dense().bool()[0, 0]
    counts, indices, whole_counts, whole_indices = band_blocks(band)
    assert counts.shape[-1] == dense.shape[0]
    for row in range(dense.shape[0]):
        part = indices[0, 0, row, : int(counts[0, 0, row])]
        whole = whole_indices[0, 0, row, : int(whole_counts[0, 0, row])]
        found = torch.cat([part, whole]).sort().values
        assert torch.equal(found, dense[row].nonzero().flatten().int())


@pytest.mark.parametrize("text", [(77, 0), (0, 77)])
def test_flex_attention_equals_the_op(text: tuple[int, int]) -> None:
    _, k, v = inputs(1, 2, 600 + sum(text), 16)
    call = [inputs(1, 2, 600, 16)[0], k, v, pairs_mask("bool", 1, 600 + sum(text))[:, :, :600]]
    module = trace(windowed(60, text), *call)
    assert lower_window_attention(module, WindowKernel.FLEX) == []
    expected = windowed(60, text)(*call)
    torch.testing.assert_close(module(*call)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [20, GRID], ids=["a band", "tiles"])
def test_queries_of_another_number_are_refused(window: Window) -> None:
    q, k = (inputs(2, 3, GRID.tokens + more, 16)[0] for more in (3, 7))
    with pytest.raises(ConfigError, match="query and key differ"):
        windowed(window, (7, 0))(q, k, k)
