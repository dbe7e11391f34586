"""Masks go with windows, in every form: those that hide keys, and those that tell queries apart."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, product
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditfastattn import ConfigError
from ditfastattn.passes.analysis.attention import attention_mask
from ditfastattn.passes.analysis.flops import count_flops
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.ir import calls, value
from ditfastattn.passes.windows import tile_attention, window_attention
from ditfastattn.passes.windows.band import Band, seen_tokens
from ditfastattn.passes.windows.forms import window_call
from ditfastattn.passes.windows.lower_window_attention import WindowKernel, lower_window_attention
from ditfastattn.passes.windows.lower_windows import compute_window, lower_windows
from ditfastattn.passes.windows.mask_windows import mask_windows
from ditfastattn.passes.windows.masks import hides_keys_alone, insert_mask, windowed_mask
from ditfastattn.passes.windows.window import TileWindow, Window
from ditfastattn.runtime import reference
from tests.helpers import capture_model
from tests.passes.windows.test_window_attention import FLEX, compiled, inputs, needs_flex, trace
from tests.tiers import slow_but

GRID = TileWindow(grid=(8, 24), tile=(2, 3), reach=(1, 1))
ROW = TileWindow(grid=(192,), tile=(12,), reach=(2,))
WINDOWS: dict[str, Window] = {"a band": 20, "no neighbours": 0, "tiles": GRID, "a sequence": ROW}
TEXTS = {"no text": (0, 0), "text before": (7, 0), "text after": (0, 7), "both": (3, 4)}


def keys_mask(kind: str, batch: int, tokens: int, heads: int = 1) -> Tensor:
    """Hide a third of the keys, other ones in each row of the batch, but never key 1 and 2."""
    index = torch.arange(tokens)
    rows = [(index * (row + 3) + row) % 3 != 0 for row in range(batch * heads)]
    seen = torch.stack(rows).view(batch, heads, 1, tokens)
    seen[..., 1:3] = True
    if kind == "bool":
        return seen
    weights = torch.linspace(-1, 1, tokens).expand(seen.shape)
    return weights.masked_fill(~seen, -torch.inf)


def pairs_mask(kind: str, batch: int, tokens: int, heads: int = 1) -> Tensor:
    """Hide pairs of query and key at random; query 3 sees no key, query 5 only the first one."""
    generator = torch.Generator().manual_seed(7)
    seen = torch.rand(batch, heads, tokens, tokens, generator=generator) > 0.3
    seen[..., 3, :] = False
    seen[..., 5, 1:] = False
    if kind == "bool":
        return seen
    weights = torch.rand(seen.shape, generator=generator) * 2 - 1
    return weights.masked_fill(~seen, -torch.inf)


def masked(window: Window, text: tuple[int, int]) -> Callable[..., Tensor]:
    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        target, arguments = window_call(window, 0.25, text, mask)
        result: Tensor = target(q, k, v, *arguments)
        return result

    return model


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, window: Window, text: tuple[int, int]
) -> Tensor:
    """Attend from each query to the list of keys that it sees."""
    tokens = q.shape[2]
    if isinstance(window, TileWindow):
        pairs = tile_attention.seen_pairs(window, *text)
    else:
        pairs = window_attention.seen_pairs(tokens, window, *text)
    bias = mask if mask.is_floating_point() else torch.where(mask, 0.0, -torch.inf)
    bias = bias.expand(q.shape[0], q.shape[1], tokens, tokens)
    result = torch.zeros_like(q)
    for b, h, i in product(range(q.shape[0]), range(q.shape[1]), range(tokens)):
        row = bias[b, h, i]
        seen = (pairs[i] & (row > -torch.inf)).nonzero().flatten()
        if len(seen):
            scores = k[b, h, seen] @ q[b, h, i] * 0.25 + row[seen]
            result[b, h, i] = scores.softmax(0) @ v[b, h, seen]
    return result


KINDS: dict[str, Callable[[int], Tensor]] = {
    "keys": lambda tokens: keys_mask("bool", 2, tokens),
    "keys of all rows": lambda tokens: keys_mask("bool", 1, tokens),
    "weights of keys": lambda tokens: keys_mask("float", 2, tokens),
    "weights by head": lambda tokens: keys_mask("float", 2, tokens, 3),
    "pairs": lambda tokens: pairs_mask("bool", 2, tokens),
    "pairs of all rows": lambda tokens: pairs_mask("bool", 1, tokens),
    "weights of pairs": lambda tokens: pairs_mask("float", 1, tokens),
    "pairs by head": lambda tokens: pairs_mask("float", 2, tokens, 3),
}


COMPILED = ("keys", "pairs", "weights by head")


@pytest.mark.parametrize("kind", slow_but({"keys", "pairs", "pairs by head"}, KINDS))
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_the_op_and_its_form_attend_to_the_keys_left(
    window: Window, text: tuple[int, int], kind: str
) -> None:
    tokens = GRID.tokens + sum(text)
    q, k, v = inputs(2, 3, tokens, 16)
    mask = KINDS[kind](tokens)
    expected = by_hand(q, k, v, mask, window, text)
    found = masked(window, text)(q, k, v, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    unmasked = masked(window, text)(q, k, v, torch.ones_like(mask, dtype=torch.bool))
    assert (unmasked - expected).abs().max() > 0.1
    module = trace(masked(window, text), q, k, v, mask)
    assert lower_windows(module) == []
    assert not calls(module.graph, window_attention.WINDOW_ATTENTION, tile_attention.TILE_ATTENTION)
    torch.testing.assert_close(module(q, k, v, mask)[0], expected, rtol=0, atol=1e-5)
    eager = compute_window(q, k, v, window, 0.25, text, mask)
    torch.testing.assert_close(eager, expected, rtol=0, atol=1e-5)
    whole = mask.expand(-1, -1, tokens, -1)  # as a model may spell it
    eager = compute_window(q, k, v, window, 0.25, text, whole)
    torch.testing.assert_close(eager, expected, rtol=0, atol=1e-5)
    site = SimpleNamespace(window=window, text=text)
    call = {"query": q, "key": k, "value": v, "attn_mask": mask, "scale": 0.25}
    interpreted = reference._window(cast(Site, site), call)
    torch.testing.assert_close(interpreted, expected, rtol=0, atol=2e-6)
    outside = trace(masked(window, text), q, k, v, mask)
    assert mask_windows(outside) == 1
    torch.testing.assert_close(outside(q, k, v, mask)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WINDOWS)
def test_masked_pairs_in_half_precision(name: str, dtype: torch.dtype) -> None:
    window, text = WINDOWS[name], (3, 4)
    tokens = GRID.tokens + sum(text)
    q, k, v = (item.to(dtype) for item in inputs(2, 3, tokens, 16))
    for mask in (pairs_mask("bool", 2, tokens), pairs_mask("float", 1, tokens).to(dtype)):
        expected = masked(window, text)(q, k, v, mask)
        module = trace(masked(window, text), q, k, v, mask)
        assert lower_windows(module) == []
        torch.testing.assert_close(module(q, k, v, mask)[0], expected, rtol=0, atol=2e-2)


QUICK = [("a band", "pairs"), ("tiles", "weights by head")]


@pytest.mark.parametrize(
    ("name", "kind"),
    slow_but(QUICK[:1], dict.fromkeys([*QUICK, *zip(WINDOWS, cycle(COMPILED), strict=False)])),
)
def test_compiled_forms_equal_the_op(name: str, kind: str) -> None:
    text, window = (0, 7), WINDOWS[name]
    tokens = GRID.tokens + sum(text)
    examples = (*inputs(2, 3, tokens, 16), KINDS[kind](tokens))
    module = trace(masked(window, text), *examples)
    assert lower_windows(module) == []
    expected = masked(window, text)(*examples)
    torch.testing.assert_close(compiled(module, *examples), expected, rtol=0, atol=1e-5)


@needs_flex
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask_of", "kind", "mask_batch", "mask_heads", "text"),
    [
        (keys_mask, "bool", 2, 1, (77, 0)),
        (pairs_mask, "bool", 2, 2, (77, 0)),
        (keys_mask, "float", 1, 1, (0, 0)),
        (keys_mask, "float", 2, 2, (0, 77)),
        (pairs_mask, "bool", 2, 2, (0, 77)),
    ],
)
def test_compiled_flex_equals_the_op(
    mask_of: Callable[..., Tensor],
    kind: str,
    mask_batch: int,
    mask_heads: int,
    text: tuple[int, int],
) -> None:
    tokens = 600 + sum(text)
    mask = mask_of(kind, mask_batch, tokens, mask_heads)
    examples = (*inputs(2, 2, tokens, 16), mask)
    module = trace(masked(200, text), *examples)  # wide enough for blocks that lie wholly inside
    assert lower_window_attention(module, WindowKernel.FLEX) == []
    assert len(calls(module.graph, FLEX)) == 1
    expected = masked(200, text)(*examples)
    torch.testing.assert_close(compiled(module, *examples), expected, rtol=0, atol=1e-5)


def padded(tokens: int) -> Tensor:
    """Hide all but the first five keys: far queries see none."""
    return (torch.arange(tokens) < 5).expand(2, 1, 1, tokens)


@pytest.mark.parametrize("name", slow_but({"tiles"}, WINDOWS))
def test_a_query_that_sees_no_key_gives_zero(name: str) -> None:
    window = WINDOWS[name]
    q, k, v = inputs(2, 3, GRID.tokens, 16)
    examples = (q, k, v, padded(GRID.tokens))
    expected = by_hand(*examples, window, (0, 0))
    assert not expected[:, :, -1].any()
    found = masked(window, (0, 0))(*examples)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    module = trace(masked(window, (0, 0)), *examples)
    lower_windows(module)
    torch.testing.assert_close(module(*examples)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(compiled(module, *examples), expected, rtol=0, atol=1e-5)


@needs_flex
@pytest.mark.slow
def test_a_query_that_sees_no_key_gives_zero_by_flex() -> None:
    examples = (*inputs(2, 2, 601, 16), padded(601))
    module = trace(masked(60, (0, 0)), *examples)
    assert lower_window_attention(module, WindowKernel.FLEX) == []
    expected = masked(60, (0, 0))(*examples)
    torch.testing.assert_close(compiled(module, *examples), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask_of", [keys_mask, pairs_mask])
def test_masked_blocks_skip_the_rest_and_count_the_same(mask_of: Callable[..., Tensor]) -> None:
    tokens = 1024 + 77
    examples = (*inputs(2, 2, tokens, 16), mask_of("bool", 2, tokens))
    module = trace(masked(128, (0, 77)), *examples)
    counted = count_flops(module.graph)
    plain = trace(lambda q, k, v: masked(128, (0, 77))(q, k, v, None), *examples[:3])
    assert counted == count_flops(plain.graph)
    lower_windows(module)
    image, text = calls(module.graph, torch.ops.aten.scaled_dot_product_attention.default)
    assert value(image.args[1]).shape == (8 * 2, 2, 128 + 2 * 128 + 77, 16)
    assert value(text.args[0]).shape == (2, 2, 77, 16)


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        (TileWindow(grid=(128, 128), tile=(16, 16), reach=(1, 1)), "the bias of its tiles"),
        (2048, "the bias of its blocks"),
    ],
    ids=str,
)
def test_a_bias_that_would_take_too_much_memory_is_declined(window: Window, reason: str) -> None:
    tokens, heads = 128 * 128, 24
    q = torch.zeros(1).expand(2, heads, tokens, 8)
    mask = torch.ones(1, dtype=torch.bool).expand(2, heads, tokens, tokens)
    module = trace(masked(window, (0, 0)), q, q, q, mask)
    (declined,) = lower_windows(module)
    assert f"{reason} would take" in declined
    few = trace(masked(window, (0, 0)), q[:1], q[:1], q[:1], mask[:1, :1])
    assert lower_windows(few) == []


def test_the_tokens_seen_are_those_of_the_blocks() -> None:
    band = Band(100, 10, torch.float32, torch.device("cpu"), 2, 3)
    seen = seen_tokens(band)
    assert seen.shape == (band.blocks, band.span + 5)
    assert seen[:, -5:].tolist() == [[0, 1, 102, 103, 104]] * band.blocks
    inner = seen[1, : band.span]
    assert inner.tolist() == list(range(band.block - 10 + 2, band.block - 10 + 2 + band.span))
    assert int(seen.max()) < 105


def test_bad_masks_are_config_errors() -> None:
    q, k, v = inputs(2, 3, 192, 8)
    for window in WINDOWS.values():
        for shape in [(2, 1, 7, 192), (2, 1, 1, 7), (3, 1, 1, 192), (2, 2, 1, 192), (1, 192)]:
            with pytest.raises(ConfigError, match="the mask does not fit these tokens"):
                masked(window, (0, 0))(q, k, v, torch.ones(shape, dtype=torch.bool))


class Masked(torch.nn.Module):
    """Attend, masked by what ``build`` makes of ``[2, 12]``."""

    def __init__(self, build: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.build = build

    def forward(self, q: Tensor, keys: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, q, q, attn_mask=self.build(keys))


MASKS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "keys": (lambda m: m[:, None, None, :], True),
    "expanded": (lambda m: m[:, None, None, :].expand(-1, -1, 12, -1), True),
    "repeated": (lambda m: m.view(2, 1, 1, 12).repeat(1, 1, 12, 1), True),
    "additive": (lambda m: ((1.0 - m.float()) * -1e4)[:, None, None].expand(2, 2, 12, 12), True),
    "filled": (
        lambda m: torch.zeros(2, 1, 12, 12).masked_fill(~m[:, None, None, :], -torch.inf),
        True,
    ),
    "combined": (lambda m: m[:, None, None] & torch.ones(12, 12, dtype=torch.bool), True),
    "no batch": (lambda m: m[:1].expand(12, 12), True),
    "of queries": (lambda m: m[:, None, :, None].expand(-1, -1, -1, 12), False),
    "of pairs": (lambda m: m[:, None, None, :] & m[:, None, :, None], False),
    "causal": (lambda m: torch.ones(12, 12, dtype=torch.bool).tril() & m[:, None, None], False),
    "reshaped": (lambda m: m[:1].expand(12, 12).reshape(1, 1, 12, 12), True),
    "of queries, one column": (lambda m: m[:, None, :, None], False),
    "mixed up": (lambda m: m.expand(12, 2, 12).reshape(2, 1, 12, 12), False),
    "transposed": (lambda m: m[:1].expand(12, 12).mT, False),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_keys_are_told_from_others(name: str) -> None:
    build, expected = MASKS[name]
    keys = torch.rand(2, 12) > 0.5
    captured = capture_model(Masked(build), {"q": torch.randn(2, 2, 12, 4), "keys": keys})
    module, names = captured.module, captured.dynamic_names
    (node,) = calls(module.graph, torch.ops.aten.scaled_dot_product_attention.default)
    mask = attention_mask(node)
    assert mask is not None
    assert hides_keys_alone(mask, 12) is expected
    with module.graph.inserting_before(node):
        row = insert_mask(module.graph, mask, 12, node)
        assert insert_mask(module.graph, mask, 12, node) is row
    module.graph.output_node().args = ((row,),)
    module.recompile()
    given = {"keys": keys, "q": torch.randn(2, 2, 12, 4)}
    (found,) = module(*(given[name] for name in names))
    assert found.shape[2:] == (1 if expected else 12, 12)
    every = (2, 2, 12, 12)
    assert torch.equal(found.broadcast_to(every), build(keys).broadcast_to(every))
    assert torch.equal(windowed_mask(build(keys), 12, expected), found)
