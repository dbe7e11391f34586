"""Write matrix products, convolutions and attention in ONNX.

Attention is MatMul-Softmax-MatMul, which runtimes fuse.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.emitter import Emitter, Value
from ditfastattn.export.operators.base import Call, Rule, in_fp32
from ditfastattn.export.operators.elementwise import finite_minimum, operand
from ditfastattn.export.operators.shapes import transpose
from ditfastattn.passes.graph.ir import ATTENTION, aten


def transposed(emitter: Emitter, matrix: Value) -> str:
    """Return the transpose of a matrix; a weight is stored transposed."""
    if matrix.tensor is None:
        return transpose(emitter, matrix.name, [1, 0])
    return emitter.initializer(f"{matrix.name}.T", matrix.tensor.t())


def _linear(emitter: Emitter, call: Call) -> str:
    source, weight = call.args[:2]
    bias: Value | None = call.get(2, "bias")
    product = emitter.op("MatMul", emitter.use(source), transposed(emitter, weight))
    return product if bias is None else emitter.op("Add", product, emitter.use(bias))


def _matmul(emitter: Emitter, call: Call) -> str:
    left, right = (emitter.use(item) for item in call.args[:2])
    return emitter.op("MatMul", left, right, name=call.name)


def _integer_product(emitter: Emitter, call: Call) -> str:
    """Write a product of int8 matrices, as of a model whose activations are quantized too."""
    left, right = call.args[:2]
    return emitter.op("MatMulInteger", emitter.use(left), emitter.use(right), name=call.name)


def _addmm(emitter: Emitter, call: Call) -> str:
    bias, left, right = (emitter.use(item) for item in call.args[:3])
    if call.kwargs.get("beta", 1) != 1 or call.kwargs.get("alpha", 1) != 1:
        raise ConfigError("a scaled addmm cannot be exported", where=f"node {call.name}")
    return emitter.op("Add", emitter.op("MatMul", left, right), bias, name=call.name)


def _convolution(emitter: Emitter, call: Call) -> str:
    """Write ``conv2d`` or ``conv3d``; padding may be given by name."""
    weight: Value = call.args[1]
    bias: Value | None = call.get(2, "bias")
    rank = weight.rank - 2
    stride, dilation = (
        _each(call.get(3, "stride", 1), rank),
        _each(call.get(5, "dilation", 1), rank),
    )
    padding: Any = call.get(4, "padding", 0)
    if padding == "same":
        kernel = [int(size) for size in weight.shape[2:] if isinstance(size, int)]
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [side // 2 for side in total] + [side - side // 2 for side in total]
    else:
        pads = 2 * ([0] * rank if padding == "valid" else _each(padding, rank))
    return _convolved(
        emitter,
        call,
        "Conv",
        [call.first, weight, *([] if bias is None else [bias])],
        strides=stride,
        pads=pads,
        dilations=dilation,
        group=call.get(6, "groups", 1),
    )


def _any_convolution(emitter: Emitter, call: Call) -> str:
    """Write ``aten.convolution``, which may be transposed; of it, both sizes are given in full."""
    source, weight, bias, stride, padding, dilation, transposed, more, groups = call.args
    rank = source.rank - 2
    shaped = {"output_padding": _each(more, rank)} if transposed else {}
    return _convolved(
        emitter,
        call,
        "ConvTranspose" if transposed else "Conv",
        [source, weight, *([] if bias is None else [bias])],
        strides=_each(stride, rank),
        pads=2 * _each(padding, rank),
        dilations=_each(dilation, rank),
        group=groups,
        **shaped,
    )


def _convolved(
    emitter: Emitter, call: Call, kind: str, given: list[Value], **attributes: Any
) -> str:
    operands = (operand(emitter, item, call.dtype) for item in given)
    return emitter.op(kind, *operands, name=call.name, **attributes)


def _mean_pool(emitter: Emitter, call: Call) -> str:
    """Write ``avg_pool1d``, ``avg_pool2d`` or ``avg_pool3d``."""
    kernel = call.args[1]
    rank = call.first.rank - 2 if not isinstance(kernel, tuple) else len(kernel)
    if call.get(6, "divisor_override") is not None or call.first.rank != rank + 2:
        raise ConfigError("such an average pool cannot be exported", where=f"node {call.name}")
    return emitter.op(
        "AveragePool",
        emitter.use(call.first),
        name=call.name,
        kernel_shape=_each(kernel, rank),
        strides=_each(call.get(2, "stride") or kernel, rank),
        pads=2 * _each(call.get(3, "padding", 0), rank),
        ceil_mode=int(call.get(4, "ceil_mode", False)),
        count_include_pad=int(call.get(5, "count_include_pad", True)),
    )


def _each(item: Any, rank: int) -> list[int]:
    listed = [item] if isinstance(item, int) else list(item)
    return listed * rank if len(listed) == 1 else listed


def _attention(emitter: Emitter, call: Call) -> str:
    query, key, value_ = (emitter.use(item) for item in call.args[:3])
    head_dim = call.first.shape[-1]
    scale: Any = call.get(6, "scale")
    assert isinstance(head_dim, int)
    if call.get(7, "enable_gqa", False):
        key, value_ = (_repeat_heads(emitter, call, item) for item in call.args[1:3])
    biases = [mask_bias(emitter, call.get(3, "attn_mask"), call)]
    if call.get(5, "is_causal", False):
        biases.append(_causal_bias(emitter, call))
    factor = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    kept = [bias for bias in biases if bias]
    found = attend(emitter, call, (query, key, value_), factor, kept, call.first.rank)
    return _zero_where_blind(emitter, call, found)


def _zero_where_blind(emitter: Emitter, call: Call, found: str) -> str:
    """Return zeros for queries whose mask hides all keys, as torch does; a softmax averages."""
    mask: Value | None = call.get(3, "attn_mask")
    if mask is None or mask.dtype != torch.bool or mask.rank < 2 or mask.shape[-2] == 1:
        return found
    if mask.tensor is not None and bool(mask.tensor.any(-1).all()):
        return found
    flags = emitter.cast(emitter.use(mask), torch.int32)
    sees = emitter.op("ReduceMax", flags, emitter.ints([-1]), keepdims=1)
    return emitter.op("Mul", found, emitter.cast(sees, call.dtype))


def attend(
    emitter: Emitter,
    call: Call,
    tensors: tuple[str, str, str],
    scale: float,
    biases: list[str],
    rank: int = 4,
) -> str:
    """Return softmax(scale Q K^T + biases) V; the last two axes are tokens and channels."""
    query, key, value_ = tensors
    scaled = emitter.op("Mul", query, emitter.scalar(scale, call.dtype))
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = emitter.op(
        "MatMul", scaled, transpose(emitter, key, order), name=f"{call.name}.scores"
    )
    for bias in biases:
        scores = emitter.op("Add", scores, bias)
    weights = emitter.op("Softmax", scores, axis=-1, name=f"{call.name}.weights")
    return emitter.op("MatMul", weights, value_, name=call.name)


def mask_bias(emitter: Emitter, mask: Value | None, call: Call) -> str:
    """Return what a mask adds to the scores, "" without a mask."""
    if mask is None:
        return ""
    if mask.dtype != torch.bool:
        return operand(emitter, mask, call.dtype)
    seen, hidden = (
        emitter.scalar(number, call.dtype) for number in (0.0, finite_minimum(call.dtype))
    )
    return emitter.op("Where", emitter.use(mask), seen, hidden)


def _causal_bias(emitter: Emitter, call: Call) -> str:
    queries, keys = call.first.shape[-2], call.args[1].shape[-2]
    assert isinstance(queries, int)
    assert isinstance(keys, int)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril()
    return emitter.constant(additive(seen, call.dtype))


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to scores so that only those ``seen`` count."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, finite_minimum(dtype))


def _repeat_heads(emitter: Emitter, call: Call, item: Value) -> str:
    heads, own = call.first.shape[1], item.shape[1]
    assert isinstance(heads, int)
    assert isinstance(own, int)
    if heads == own:
        return emitter.use(item)
    apart = emitter.op("Unsqueeze", emitter.use(item), emitter.ints([2]))
    spread = emitter.op("Expand", apart, emitter.ints([1, 1, heads // own, 1, 1]))
    return emitter.reshape(spread, (item.shape[0], heads, *item.shape[2:]))


PRODUCTS: dict[Any, Rule] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten._int_mm.default: _integer_product,
    aten.addmm.default: _addmm,
    aten.conv1d.default: in_fp32(_convolution),
    aten.conv2d.default: in_fp32(_convolution),
    aten.conv2d.padding: in_fp32(_convolution),
    aten.conv3d.default: in_fp32(_convolution),
    aten.conv3d.padding: in_fp32(_convolution),
    aten.convolution.default: in_fp32(_any_convolution),
    aten.avg_pool1d.default: in_fp32(_mean_pool),
    aten.avg_pool2d.default: in_fp32(_mean_pool),
    aten.avg_pool3d.default: in_fp32(_mean_pool),
    ATTENTION: _attention,
}
