from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.flop_counter import FlopCounterMode

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.graph.ir import calls, value
from ditfastattn.passes.windows.band import Band
from ditfastattn.passes.windows.flex_window import FLEX_BLOCK, band_blocks
from ditfastattn.passes.windows.lower_window_attention import WindowKernel, lower_window_attention
from ditfastattn.passes.windows.window_attention import kept_pairs, window_attention

WINDOW = torch.ops.ditfastattn.window_attention.default
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
FLEX = torch.ops.higher_order.flex_attention

needs_flex = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="FlexAttention's CPU lowering needs AVX2",
)


def inputs(*shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    rows = []
    for i in range(q.shape[2]):
        seen = slice(max(0, i - window), i + window + 1)
        scores = (q[:, :, i, None] * k[:, :, seen]).sum(-1) * scale
        rows.append((scores.softmax(-1)[..., None] * v[:, :, seen]).sum(2))
    return torch.stack(rows, 2)


def trace(function: Callable[..., Tensor], *examples: Tensor) -> GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(example) for example in examples]
    with torch.no_grad():
        traced: Any = make_fx(_tupled(function), pre_dispatch=True)
        module: GraphModule = traced(*fakes)
    return module


def _tupled(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda *args: (function(*args),)


def compiled(module: GraphModule, *args: Tensor) -> Tensor:
    with torch.no_grad():
        runner: Any = compile_fx(module, list(args))
        result: Tensor = runner(*args)[0]
    return result


def windowed(window: int, *text: int) -> Callable[..., Tensor]:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = window_attention(q, k, v, window, 0.25, *text)
        return result

    return model


def projected(window: int) -> Callable[..., Tensor]:
    """Attend over views of ``[B, N, H * D]``, as models do."""

    def model(x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], 4, 16).transpose(1, 2) for t in (x, y, x + y))
        return windowed(window)(q, k, v).transpose(1, 2).flatten(2)

    return model


# The op.


@pytest.mark.parametrize("tokens", [1, 16, 33])
@pytest.mark.parametrize("window", [0, 1, 5, 33, 1000])
def test_op_equals_dense_computation(tokens: int, window: int) -> None:
    q, k, v = inputs(2, 3, tokens, 8)
    expected = dense(q, k, v, window, 0.3)
    actual = window_attention(q, k, v, window, 0.3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


def arrow(q: Tensor, k: Tensor, v: Tensor, window: int, text: tuple[int, int]) -> Tensor:
    """Attend within the band of the image's tokens, and from and to every text token."""
    before, after = text
    tokens = q.shape[2]
    image = range(before, tokens - after)
    rows = []
    for i in range(tokens):
        seen = [
            j for j in range(tokens) if abs(i - j) <= window or i not in image or j not in image
        ]
        scores = (q[:, :, i, None] * k[:, :, seen]).sum(-1) * 0.25
        rows.append((scores.softmax(-1)[..., None] * v[:, :, seen]).sum(2))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("text", [(5, 0), (0, 5), (3, 4)])
def test_the_text_attends_and_is_attended_by_all(text: tuple[int, int]) -> None:
    q, k, v = inputs(2, 3, 29, 8)
    expected = arrow(q, k, v, 2, text)
    torch.testing.assert_close(windowed(2, *text)(q, k, v), expected, rtol=0, atol=2e-6)


def test_window_zero_returns_the_values() -> None:
    q, k, v = inputs(1, 2, 9, 4)
    torch.testing.assert_close(window_attention(q, k, v, 0, 1.0), v, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_op_keeps_the_dtype(dtype: torch.dtype) -> None:
    q, k, v = (tensor.to(dtype) for tensor in inputs(1, 2, 20, 8))
    actual = window_attention(q, k, v, 3, 0.3)
    assert actual.dtype is dtype
    expected = dense(q.double(), k.double(), v.double(), 3, 0.3)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("batch", [1, 2])
def test_fake_kernel_agrees(batch: int) -> None:
    for layout in (inputs(batch, 3, 12, 8), [t.transpose(1, 2) for t in inputs(batch, 12, 3, 8)]):
        real = window_attention(*layout, 2, 0.3)
        mode = FakeTensorMode()
        fake = window_attention(*(mode.from_tensor(tensor) for tensor in layout), 2, 0.3)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
        torch.library.opcheck(WINDOW, (*layout, 2, 0.3))


def test_heads_merge_as_a_view() -> None:
    merged = window_attention(*inputs(2, 3, 12, 8), 2, 0.3).transpose(1, 2)
    assert merged.view(2, 12, 24).shape == (2, 12, 24)


@pytest.mark.parametrize(("tokens", "window"), [(1, 0), (7, 2), (8, 7), (8, 100), (13, 0)])
def test_flops_count_the_kept_pairs(tokens: int, window: int) -> None:
    pairs = sum(abs(i - j) <= window for i in range(tokens) for j in range(tokens))
    assert kept_pairs(tokens, tokens, window) == pairs
    with FlopCounterMode(display=False) as counter:
        window_attention(*inputs(2, 3, tokens, 8), window, 0.3)
    assert counter.get_total_flops() == 2 * 2 * (2 * 3) * 8 * pairs


def test_flops_count_the_texts_pairs() -> None:
    tokens, window, text = 13, 2, (2, 1)
    image = range(text[0], tokens - text[1])
    pairs = sum(
        abs(i - j) <= window or i not in image or j not in image
        for i in range(tokens)
        for j in range(tokens)
    )
    assert kept_pairs(tokens, tokens, window, sum(text)) == pairs
    with FlopCounterMode(display=False) as counter:
        window_attention(*inputs(2, 3, tokens, 8), window, 0.3, *text)
    assert counter.get_total_flops() == 2 * 2 * (2 * 3) * 8 * pairs


def test_bad_inputs_are_config_errors() -> None:
    q, k, v = inputs(1, 2, 8, 4)
    with pytest.raises(ConfigError, match="the window is negative"):
        window_attention(q, k, v, -1, 0.5)
    with pytest.raises(ConfigError, match="query and key differ"):
        window_attention(q, k[:, :1], v, 1, 0.5)
    with pytest.raises(ConfigError, match="query and value differ"):
        window_attention(q, k, v.double(), 1, 0.5)
    with pytest.raises(ConfigError, match="wrong rank"):
        window_attention(q[0], k[0], v[0], 1, 0.5)


# The lowering.


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("tokens", "window"), [(256, 32), (203, 40), (301, 0), (1000, 300)])
def test_blocks_equal_the_op(batch: int, tokens: int, window: int) -> None:
    x, y, _ = inputs(batch, tokens, 64)
    module = trace(projected(window), x, y)
    assert lower_window_attention(module) == []
    assert not calls(module.graph, WINDOW)
    expected = projected(window)(x, y)
    torch.testing.assert_close(module(x, y)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("batch", "tokens", "window"), [(1, 256, 32), (2, 203, 40)])
def test_compiled_blocks_equal_the_op(batch: int, tokens: int, window: int) -> None:
    x, y, _ = inputs(batch, tokens, 64)
    module = trace(projected(window), x, y)
    assert lower_window_attention(module) == []
    expected = projected(window)(x, y)
    torch.testing.assert_close(compiled(module, x, y), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", [(7, 0), (0, 7), (3, 4)])
@pytest.mark.parametrize(("tokens", "window"), [(256, 32), (203, 20)])
def test_blocks_with_text_equal_the_op(tokens: int, window: int, text: tuple[int, int]) -> None:
    examples = inputs(2, 3, tokens + sum(text), 16)
    module = trace(windowed(window, *text), *examples)
    assert lower_window_attention(module) == []
    assert not calls(module.graph, WINDOW)
    expected = windowed(window, *text)(*examples)
    torch.testing.assert_close(module(*examples)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(compiled(module, *examples), expected, rtol=0, atol=1e-5)


def test_blocks_with_text_skip_the_rest() -> None:
    module = trace(windowed(128, 0, 77), *inputs(1, 2, 1024 + 77, 16))
    lower_window_attention(module)
    image, text = calls(module.graph, ATTENTION)
    assert value(image.args[1]).shape == (8, 2, 128 + 2 * 128 + 77, 16)
    assert value(text.args[0]).shape == (1, 2, 77, 16)


@needs_flex
@pytest.mark.slow  # by default test_key_masks.py compiles one with text
@pytest.mark.parametrize("text", [(77, 0), (0, 77)])
def test_compiled_flex_with_text_equals_the_op(text: tuple[int, int]) -> None:
    examples = inputs(1, 2, 600 + sum(text), 16)
    module = trace(windowed(60, *text), *examples)
    assert lower_window_attention(module, WindowKernel.FLEX) == []
    expected = windowed(60, *text)(*examples)
    torch.testing.assert_close(compiled(module, *examples), expected, rtol=0, atol=1e-5)


@needs_flex
def test_compiled_flex_equals_equals_the_op() -> None:
    examples = inputs(2, 2, 601, 16)
    module = trace(windowed(200), *examples)  # wide enough for blocks that lie wholly inside
    assert lower_window_attention(module, WindowKernel.FLEX) == []
    assert len(calls(module.graph, FLEX)) == 1
    assert not calls(module.graph, WINDOW, ATTENTION)
    expected = windowed(200)(*examples)
    torch.testing.assert_close(compiled(module, *examples), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", [WindowKernel.BLOCKS, WindowKernel.FLEX])
def test_lowered_graph_keeps_value_layout_and_origin(kernel: WindowKernel) -> None:
    module = trace(windowed(30), *inputs(2, 3, 300, 16))
    (node,) = calls(module.graph, WINDOW)
    node.meta["stack_trace"] = "File model.py, line 7"
    before = value(node)
    lower_window_attention(module, kernel)
    module.graph.lint()
    (after,) = module.graph.output_node().all_input_nodes
    assert (value(after).shape, value(after).stride()) == (before.shape, before.stride())
    added = module.graph.find_nodes(op="call_function", target=ATTENTION)
    added += module.graph.find_nodes(op="call_function", target=FLEX)
    assert [new.meta["stack_trace"] for new in added] == ["File model.py, line 7"]
    assert all("val" in new.meta for new in module.graph.nodes if new.op == "call_function")


def test_no_query_block_sees_all_keys() -> None:
    tokens, window = 1024, 128
    module = trace(windowed(window), *inputs(1, 2, tokens, 16))
    lower_window_attention(module)
    (attention,) = calls(module.graph, ATTENTION)
    query, key = (value(node) for node in attention.all_input_nodes[:2])
    assert query.shape == (8, 2, 128, 16)
    assert key.shape == (8, 2, 128 + 2 * window, 16)


def test_masks_are_shared_within_and_across_modules() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inner = window_attention(q, k, v, 20, 0.5)
        return windowed(20)(inner, k, v) + windowed(10)(q, k, v)

    examples = inputs(1, 2, 300, 16)
    first, second = trace(model, *examples), trace(model, *examples)
    for module in (first, second):
        assert lower_window_attention(module) == []
        assert len(calls(module.graph, ATTENTION)) == 3
        assert len(list(module.buffers())) == 2
    pairs = zip(first.buffers(), second.buffers(), strict=True)
    assert all(one is other for one, other in pairs)


def test_flex_masks_are_shared() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return windowed(20)(windowed(20)(q, k, v), k, v)

    module = trace(model, *(t.transpose(1, 2) for t in inputs(1, 300, 2, 16)))
    assert lower_window_attention(module, WindowKernel.FLEX) == []
    assert len(calls(module.graph, FLEX)) == 2
    assert len(list(module.buffers())) == 4
    assert len(list(module.children())) == 2  # one score function, one mask function


def test_lowering_twice_adds_to_what_is_there() -> None:
    examples = inputs(1, 2, 300, 16)
    module = trace(windowed(20), *examples)
    lower_window_attention(module)
    (first,) = module.buffers()
    output = module.graph.output_node()
    with module.graph.inserting_before(output):
        arguments = (*module.graph.find_nodes(op="placeholder"), 10, 0.25)
        again = module.graph.call_function(WINDOW, arguments)
    again.meta["val"] = value(output.all_input_nodes[0])
    output.args = ((again,),)
    assert lower_window_attention(module) == []
    assert next(module.buffers()) is first
    assert len(list(module.buffers())) == 2
    expected = window_attention(*examples, 10, 0.25)
    torch.testing.assert_close(module(*examples)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tokens", "window"), [(512, 60), (700, 128), (1000, 300), (384, 0)])
def test_band_blocks_are_those_of_create_block_mask(tokens: int, window: int) -> None:
    mask = create_block_mask(
        lambda batch, head, query, key: (query - key).abs() <= window,
        None, None, tokens, tokens, device="cpu", BLOCK_SIZE=FLEX_BLOCK,
    )  # fmt: skip
    expected = mask.as_tuple()[2:6]
    built = band_blocks(Band(tokens, window, torch.float32, torch.device("cpu")))
    for actual, wanted in zip(built, expected, strict=True):
        assert isinstance(wanted, Tensor)
        assert actual.dtype is wanted.dtype
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("text", [(77, 0), (0, 77), (200, 130), (128, 0)])
def test_band_blocks_with_text_are_those_of_create_block_mask(text: tuple[int, int]) -> None:
    tokens, window = 700, 60
    total = tokens + sum(text)

    def kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first, last = text[0], text[0] + tokens
        outside = (query < first) | (query >= last) | (key < first) | (key >= last)
        return ((query - key).abs() <= window) | outside

    mask = create_block_mask(kept, None, None, total, total, device="cpu", BLOCK_SIZE=FLEX_BLOCK)
    dense = mask.to_dense().bool()[0, 0]
    counts, indices, whole_counts, whole_indices = band_blocks(
        Band(tokens, window, torch.float32, torch.device("cpu"), *text)
    )
    for row in range(dense.shape[0]):
        part = indices[0, 0, row, : int(counts[0, 0, row])]
        whole = whole_indices[0, 0, row, : int(whole_counts[0, 0, row])]
        found = torch.cat([part, whole]).sort().values
        assert torch.equal(found, dense[row].nonzero().flatten().int())


# What stays.


def declined(kernel: WindowKernel, examples: list[Tensor], window: int) -> str:
    module = trace(windowed(window), *examples)
    (reason,) = lower_window_attention(module, kernel)
    assert len(calls(module.graph, WINDOW)) == 1
    assert list(module.buffers()) == []
    return reason


def test_window_that_skips_nothing_stays_and_runs() -> None:
    examples = inputs(1, 2, 64, 16)
    reason = "window_attention: a window of 16 per side in blocks of 32 leaves none of 64 tokens"
    assert declined(WindowKernel.AUTO, examples, 16).startswith(reason)
    module = trace(windowed(1000), *examples)
    assert len(lower_window_attention(module)) == 1
    expected = window_attention(*examples, 1000, 0.25)
    torch.testing.assert_close(compiled(module, *examples), expected, rtol=0, atol=1e-5)


def test_flex_declines_what_it_cannot_run() -> None:
    doubles = [tensor.double() for tensor in inputs(1, 2, 512, 16)]
    assert "does not take torch.float64" in declined(WindowKernel.FLEX, doubles, 8)
    narrow = inputs(1, 2, 512, 8)
    assert "needs head_dim >= 16, not 8" in declined(WindowKernel.FLEX, narrow, 8)


def test_huge_bias_is_declined() -> None:
    mode = FakeTensorMode()
    with mode:
        examples = [torch.empty(1, 1, 2**16, 16) for _ in range(3)]
    with torch.no_grad():
        module = make_fx(_tupled(windowed(2**13)))(*examples)
    (reason,) = lower_window_attention(module)
    assert "the bias of its blocks would take 4160 MiB" in reason


def test_symbolic_shape_is_declined() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    free: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * 3])
    q = mode.from_tensor(torch.randn(2, 2, 512, 16), symbolic_context=free)
    with torch.no_grad():
        module = make_fx(lambda q: (window_attention(q, q, q, 8, 0.25),))(q)
    (reason,) = lower_window_attention(module)
    assert "its shape is symbolic" in reason
