"""Each operator's rule computes in ONNX Runtime what torch does, at any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as torch's users name it
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ditfastattn import ConfigError
from ditfastattn.export.lint import findings
from ditfastattn.passes.windows.forms import window_call
from ditfastattn.passes.windows.window import TileWindow, Window
from tests.export.helpers import assert_same, run_graph, write_module
from tests.helpers import noise

Function = Callable[[Tensor], Any]


class Calls(nn.Module):
    """Call a function of ``[B, 6, 8]``."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def rotated(x: Tensor) -> Tensor:
    """Rotate pairs of numbers, as rotary embeddings do with complex ones."""
    angles = torch.arange(12.0).view(3, 4)
    turns = torch.cat([torch.polar(torch.ones(3, 4), angles)] * 2).view(2, 3, 4)
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * turns[:1] + numbers.conj()).flatten(-2)


def places() -> Tensor:
    return torch.tensor([3, 0, -2])


def written(x: Tensor, where: Any, values: Tensor) -> Tensor:
    copy = x.clone()
    copy[where] = values
    return copy


def routed(x: Tensor) -> Any:
    return x.topk(2, dim=-1)


X = noise(0, 2, 6, 8)
DTYPES: dict[torch.dtype, float] = {  # with the tolerance; in bf16 a sum may round the other way
    **{dtype: 1e-5 for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)},
    **{torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2},
}
FUNCTIONS: dict[str, Function] = {
    "numbers": lambda x: (2 - x) * 0.5 + x / 3 - 1,
    "alpha": lambda x: torch.add(x, x, alpha=3) + torch.rsub(x, 2, alpha=2),
    "powers": lambda x: x**2 + (x.abs() + 1) ** 0.5 + (x.abs() + 1) ** -1.5,
    "exponentials": lambda x: x.exp() + (x.abs() + 1).log() + x.sigmoid() + x.tanh(),
    "trigonometry": lambda x: x.sin() + x.cos(),
    "roots": lambda x: (x.abs() + 1).sqrt() + (x.abs() + 1).rsqrt() + (x.abs() + 1).reciprocal(),
    "activations": lambda x: F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.relu(x),
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1),
    "where": lambda x: torch.where(x > 0, x, 0.0) + torch.where(x <= 0.2, x, -x),
    "comparisons": lambda x: ((x < 0.5) & ~(x == 0)).float() + (x != 0).to(x.dtype),
    "masked fill": lambda x: x.masked_fill(x > 1, -5.0),
    "integers": lambda x: torch.arange(6) * x.sum(-1) + x.sum(-1).to(torch.int64),
    "casts": lambda x: x.double().float() * x.half().float(),
    "mean": lambda x: x.mean(-1, keepdim=True) + x.sum((1, 2))[:, None, None] + x.amax(1, True),
    "variance": lambda x: x.var(-1) + x.var(-1, correction=0),
    "softmax": lambda x: x.softmax(1),
    "layer norm": lambda x: F.layer_norm(x, [8]) + F.layer_norm(x, [6, 8], torch.ones(6, 8)),
    "rms norm": lambda x: F.rms_norm(x, [8], torch.arange(8.0), 1e-6),
    "group norm": lambda x: F.group_norm(x, 3, torch.arange(6.0), torch.ones(6)),
    "views": lambda x: x.view(2 * x.shape[0], 3, 8).flatten(1).reshape(-1, 4, 6),
    "reshape with two batches": lambda x: x.reshape(x.shape[0], -1).expand(3, -1, -1).mT.mT,
    "transposes": lambda x: x.transpose(1, 2).permute(1, 0, 2).movedim(0, 1),
    "slices": lambda x: x[:, 1:5:2, -3:] + x[:, :2, :3],
    "halves": lambda x: x[: x.shape[0] // 2] + x[x.shape[0] // 2 :],
    "chunk": lambda x: torch.cat(x.chunk(3, 1)[::-1], 1),
    "split": lambda x: torch.cat([*torch.split(x, [1, 5], 1), *torch.split(x, 4, 1)], 1),
    "chunk of the batch": lambda x: x.chunk(2)[1] * 2,
    "unbind": lambda x: x.unbind(1)[2] + x[:, -1],
    "squeeze": lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(-1).squeeze(1),
    "expand": lambda x: torch.ones(6, 1, 1).expand(-1, x.shape[0], 8).transpose(0, 1) + x,
    "repeat": lambda x: x.repeat(2, 1, 3) + x.repeat(2, 1, 3),
    "repeat interleave": lambda x: x.repeat_interleave(3, dim=0),
    "stack": lambda x: torch.stack([x, 2 * x], dim=1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 3), value=0.5),
    "flip": lambda x: x.flip(1, 2),
    "fill": lambda x: (
        x + torch.zeros(x.shape[0], 1, 1) + torch.ones_like(x) + torch.full_like(x, 2)
    ),
    "permuting einsum": lambda x: torch.einsum("bnc->cbn", x),
    "einsum": lambda x: torch.einsum("bnc,bmc->bnm", x, x),
    "products": lambda x: x @ x.mT + torch.bmm(x, x.mT),
    "pixel shuffle": lambda x: F.pixel_shuffle(x.reshape(x.shape[0], 4, 3, 4), 2),
    "complex numbers": lambda x: rotated(x.view(-1, 2, 3, 8)).flatten(1, 2),
    "inverse trigonometry": lambda x: (x / 9).asin() + (x / 9).acos() + x.atan(),
    "leaky relu": lambda x: F.leaky_relu(x) + F.leaky_relu(x, 0.3),
    "average pools": lambda x: (
        F.avg_pool1d(x, 2, padding=1),
        F.avg_pool3d(x.view(-1, 2, 3, 4, 2), 2, stride=(1, 2, 1)),
    ),
    "vector norms": lambda x: sum(
        torch.linalg.vector_norm(x, order, 2, True) for order in (1, 2, 3, torch.inf, -torch.inf)
    ),
    "truths": lambda x: (x > 2).any(-1) & (x > -9).all(1, True)[..., 0] | x.isnan().any(2),
    "running sum": lambda x: x.cumsum(1),
    "copy": lambda x: x.new_zeros(x.shape[0], 6, 8).copy_(x[:, :1]).add(1),
    "several indices": lambda x: x[:, places(), places() + 1],
    "indices apart": lambda x: x.view(-1, 6, 4, 2)[:, places(), :, places() % 2],
    "written at indices": lambda x: written(x, (slice(None), places(), places()), x[:, 0, :3]),
    "added at indices": lambda x: x.index_put([places() % 2], x[:1].expand(3, 6, 8), True),
    "range": lambda x: x + torch.arange(x.shape[0])[:, None, None],
    "flags": lambda x: (x > 0) * (x < 1) + (x > 2),
    "padded sequence": lambda x: nn.utils.rnn.pad_sequence([x[0], x[0, :4]], True).sum(0) + x,
    "masked flags": lambda x: (x > 0).masked_fill(x > 1, False) | torch.where(x < 0, x > -1, x > 2),
    "masked rows": lambda x: torch.index_put(x, [x[..., 0] > 0.5], torch.arange(8.0)),
    "masked write": lambda x: torch.index_put(x, [x > 0.5], torch.tensor(7.0)),
    "gather and scatter": lambda x: torch.zeros_like(x).scatter_add(
        2, routed(x).indices, x.gather(2, routed(x).indices) * routed(x).values
    ),
    "constants of constants": lambda x: x + torch.arange(480.0).view(60, 8).cos().mul(2)[:6],
    "flex attention": lambda x: flexible(x),
    "queries that see no key": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=x[..., :6] > 0.9
    ),
    "decomposed": lambda x: F.mish(x) + torch.lerp(x, 2 * x, 0.25) + F.softplus(x),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_a_function_computes_the_same(name: str, tmp_path: Path) -> None:
    assert_same(Calls(FUNCTIONS[name]), {"x": X}, tmp_path, evaluator=True)


def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query - key).abs() < 3


def nearer(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score - (query - key).abs() * 0.1


def flexible(x: Tensor) -> Tensor:
    """Attend by FlexAttention, under a mask and with scores of its own."""
    mask = create_block_mask(near, None, None, 6, 6, "cpu", BLOCK_SIZE=2)
    heads = x.view(-1, 6, 2, 4).transpose(1, 2)
    found: Any = flex_attention(heads, 2 * heads, heads - 1, nearer, mask, 0.3)
    return torch.cat([found, flex_attention(heads, heads, heads)], -1)


def by_blocks(x: Tensor) -> Any:
    """Attend by FlexAttention under a mask that only its blocks tell."""
    blocks = torch.arange(3, dtype=torch.int32).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    count = torch.full((1, 1, 3), 2, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(torch.zeros_like(count), blocks, count, blocks, BLOCK_SIZE=2)
    return flex_attention(x[:, None], x[:, None], x[:, None], block_mask=mask)


def arithmetic(x: Tensor) -> list[Tensor]:
    """Compute with numbers of any dtype what each dtype has."""
    other = x.flip(1)
    common = [x + other, x - other, x * other, x + 2, x / 3, x.maximum(other), x.minimum(other)]
    common += [x.relu(), x.clamp(1, 5), x.where(x > 2, other), x.masked_fill(x < 1, 3), x**2]
    common += [x.sum(1), x.amax(1), x.amin(1), x.cumsum(1), x.exp(), x.sqrt(), x.rsqrt()]
    common += [x.log1p(), x.atan(), x.cos(), x.floor(), x.round(), x.isnan(), -x, x.abs()]
    common += [x == other, x > other, x.logical_and(other), x.logical_not(), (x > 1) < (x > 3)]
    if x.is_floating_point():
        common += [part * 2 for part in (*x.chunk(2, -1), x.topk(2, -1).values)]
        return [*common, F.gelu(x), F.leaky_relu(x), (x / 99).asin(), (x / 99).acos(), x.softmax(1)]
    return [*common, x & other, x | 1, x ^ other, ~x, x**other, x % 3]


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_a_dtype_computes_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [
            found.float() if found.dtype == torch.bfloat16 else found
            for found in arithmetic(x.mul(3).abs().to(dtype))
        ]

    assert_same(Calls(function), {"x": X}, tmp_path, tolerance=DTYPES[dtype])


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 5), nn.Linear(5, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(F.silu(self.one(x)))
        return result


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.arange(64, dtype=torch.int8).reshape(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        rows = (x * 20).round().to(torch.int8).reshape(-1, 8)
        return torch._int_mm(rows, self.weight.t()).to(torch.float32)  # type: ignore[operator]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 2, stride=2)
        self.depthwise = nn.Conv2d(4, 4, 3, padding="same", groups=4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.depthwise(self.patches(x.reshape(x.shape[0], 3, 4, 4)))
        return result


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.up(x)
        return result


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.table((x.sum(-1) * 10).to(torch.int64) % 11)
        return result


class Gather(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.tensor([3, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.places] + x.index_select(1, self.places)  # type: ignore[arg-type, index]


@pytest.mark.parametrize("make", [Linear, Integers, Convolutions, Transposed, Embedding, Gather])
def test_a_layer_computes_the_same(make: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert_same(make(), {"x": X}, tmp_path)


def attention(**options: Any) -> Function:
    def attend(x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], 6, 2, 4).transpose(1, 2)
        keys = heads[:, :1] if options.get("enable_gqa") else heads
        return F.scaled_dot_product_attention(heads, 2 * keys, keys - 1, **options)

    return attend


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"enable_gqa": True},
        {"attn_mask": noise(3, 6, 6)},
        {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril(2)},
        {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril(-1)},  # query 0 sees no key
        {"attn_mask": torch.zeros(6, 6).masked_fill(torch.arange(6)[:, None] < 2, -torch.inf)},
        {"attn_mask": torch.full((1, 6, 6), torch.finfo().min).triu(-1)},  # the last sees all alike
        {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril(-2)},  # two queries see no key
    ],
    ids=str,
)
def test_attention_computes_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    assert_same(Calls(attention(**options)), {"x": X}, tmp_path)


class Windowed(nn.Module):
    def __init__(self, window: int, *text: int) -> None:
        super().__init__()
        self.window, self.text = window, text

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        result: Tensor = torch.ops.ditfastattn.window_attention(
            heads, 2 * heads, heads - 1, self.window, 0.5, *self.text
        )
        return result


@pytest.mark.parametrize("tokens", [8, 128, 200, 256])
@pytest.mark.parametrize("window", [0, 1, 16, 40])
def test_a_window_computes_the_same(tokens: int, window: int, tmp_path: Path) -> None:
    assert_same(Windowed(window), {"x": noise(1, 2, tokens, 8)}, tmp_path)


@pytest.mark.parametrize("text", [(5, 0), (0, 5), (3, 4)])
@pytest.mark.parametrize(("tokens", "window"), [(16, 2), (128, 16), (200, 16)])
def test_a_window_beside_text_computes_the_same(
    tokens: int, window: int, text: tuple[int, int], tmp_path: Path
) -> None:
    assert_same(Windowed(window, *text), {"x": noise(1, 2, tokens + sum(text), 8)}, tmp_path)


class TextKeys(nn.Module):
    """Attend from the image's tokens to those, and to text that is keys alone."""

    def __init__(self, window: Window, text: tuple[int, int]) -> None:
        super().__init__()
        self.window, self.text = window, text

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        target, arguments = window_call(self.window, 0.5, self.text, mask)
        before, after = self.text
        image = heads[:, :, before : heads.shape[2] - after]
        result: Tensor = target(image, 2 * heads, heads - 1, *arguments)
        return result


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("text", [(5, 0), (0, 5), (3, 4)])
@pytest.mark.parametrize(
    "window", [2, 60, TileWindow(grid=(8, 12), tile=(2, 3), reach=(1, 1))], ids=str
)
def test_text_tokens_that_are_keys_alone(
    window: Window, text: tuple[int, int], masked: bool, tmp_path: Path
) -> None:
    tokens = 96 + sum(text)
    call = {"x": noise(1, 2, tokens, 8)}
    if masked:
        call["mask"] = noise(2, 2, 1, 96, tokens) > 0
    assert_same(TextKeys(window, text), call, tmp_path)


class Tiled(nn.Module):
    def __init__(self, window: TileWindow, *text: int) -> None:
        super().__init__()
        self.window, self.text = window, text

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        target, arguments = window_call(self.window, 0.5, (0, 0))
        result: Tensor = target(heads, 2 * heads, heads - 1, *arguments, *self.text)
        return result


@pytest.mark.parametrize("text", [(), (5, 0), (0, 5), (3, 4)])
@pytest.mark.parametrize(
    "window",
    [
        TileWindow(grid=(8, 12), tile=(2, 3), reach=(1, 1)),
        TileWindow(grid=(3, 8, 6), tile=(3, 2, 1), reach=(0, 1, 2)),
    ],
    ids=str,
)
def test_a_window_by_tiles_computes_the_same(
    window: TileWindow, text: tuple[int, ...], tmp_path: Path
) -> None:
    tokens = window.tokens + sum(text)
    assert_same(Tiled(window, *text), {"x": noise(1, 2, tokens, 8)}, tmp_path)


class Masked(nn.Module):
    """Hide keys of a window: all but the first ones, differently in each row of the batch.

    Of "pairs", each query sees every third of them, and query 3 none.
    """

    def __init__(self, window: Window, kind: str, *text: int) -> None:
        super().__init__()
        self.window, self.kind = window, kind
        self.text = (text[0], text[1]) if text else (0, 0)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        mask = (torch.arange(x.shape[1]) < lengths[:, None])[:, None, None, :]
        if "pairs" in self.kind:
            index = torch.arange(x.shape[1])
            third = (index[:, None] + 2 * index) % 3 == 0
            mask = mask & third & (index != 3)[:, None]
        if "float" in self.kind:
            mask = torch.where(mask, 0.5, -torch.inf)
        target, arguments = window_call(self.window, 0.5, self.text, mask)
        result: Tensor = target(heads, 2 * heads, heads - 1, *arguments)
        return result


@pytest.mark.parametrize("kind", ["bool", "float", "bool pairs", "float pairs"])
@pytest.mark.parametrize("text", [(), (5, 0), (0, 5), (3, 4)])
@pytest.mark.parametrize(
    "window", [2, 16, 60, TileWindow(grid=(8, 12), tile=(2, 3), reach=(1, 1))], ids=str
)
def test_masked_keys_are_hidden_within_a_window(
    window: Window, text: tuple[int, ...], kind: str, tmp_path: Path
) -> None:
    tokens = 96 + sum(text)
    call = {"x": noise(1, 2, tokens, 8), "lengths": torch.tensor([tokens - 2, 7])}
    assert_same(Masked(window, kind, *text), call, tmp_path)


def test_a_window_in_blocks_skips_the_work_outside(tmp_path: Path) -> None:
    import onnx

    path, _ = write_module(Windowed(32), {"x": noise(1, 2, 512, 8)}, tmp_path)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    sizes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in inferred.graph.value_info
    }
    softmax = next(node for node in inferred.graph.node if node.op_type == "Softmax")
    assert sizes[softmax.input[0]][1:] == [2, 16, 32, 96]  # blocks of 32 queries see 96 keys


def test_an_operator_without_a_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no ONNX form(.|\n)*sort"):
        write_module(Calls(lambda x: x.sort(-1).values), {"x": X}, tmp_path)


def test_norms_of_half_precision_do_not_overflow(tmp_path: Path) -> None:
    norms = Calls(lambda x: torch.linalg.vector_norm(300 * x, 2, 2))
    assert_same(norms, {"x": X.half()}, tmp_path, tolerance=1e-2, evaluator=True)


REFUSED: dict[str, Function] = {  # apart from the messages, which quote these lines
    "roll": lambda x: torch.complex(x, x).roll(1, 1).real,
    "masked write": lambda x: torch.index_put(x, [x > -99], x.flatten()),
    "scatter": lambda x: x.scatter(1, places()[None, :2, None] % 2, x),
    "norm": lambda x: torch.linalg.vector_norm(x, 0, 1),
    "flex attention": lambda x: by_blocks(x),
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("roll", r"an operator on complex numbers has no ONNX form[\s\S]*aten\.roll"),
        ("masked write", "what a mask selects has no fixed shape"),
        ("scatter", "a part of a tensor is scattered"),
        ("norm", "a norm of order 0"),
        ("flex attention", "a FlexAttention whose mask is a list of blocks has no ONNX form"),
    ],
)
def test_what_onnx_lacks_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        write_module(Calls(REFUSED[name]), {"x": X}, tmp_path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_inputs_and_results_are_pairs(dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = torch.complex(X, X.flip(1)).to(dtype)
    path, _ = write_module(
        Calls(lambda x: (x.real + 1, x * x.conj() - x)), {"x": numbers}, tmp_path
    )
    real, product = run_graph(path, {"x": torch.view_as_real(numbers)})
    torch.testing.assert_close(real, numbers.real + 1)
    torch.testing.assert_close(torch.view_as_complex(product), numbers * numbers.conj() - numbers)


@pytest.mark.parametrize(
    "name", ["trigonometry", "inverse trigonometry", "einsum", "gather and scatter"]
)
def test_what_takes_no_bf16_is_computed_in_fp32(name: str, tmp_path: Path) -> None:
    path, _ = write_module(Calls(FUNCTIONS[name]), {"x": X.bfloat16()}, tmp_path)
    assert findings(path) == []


def test_a_model_that_depends_on_the_batch_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="depends on the batch"):
        write_module(Calls(lambda x: x + float(x.shape[0] ** 2)), {"x": X}, tmp_path)
    with pytest.raises(ConfigError, match="another batch size"):
        write_module(Calls(lambda x: x.exp() if len(x) > 2 else x.sin()), {"x": X}, tmp_path)


def test_a_fixed_batch_takes_what_a_free_one_cannot(tmp_path: Path) -> None:
    module = Calls(lambda x: x + float(x.shape[0] ** 2))
    assert_same(module, {"x": X}, tmp_path, fixed=True)
