"""Quantize tiny models as users do: with torchao, or by loading a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import nn

from tests.helpers import randomize
from tests.tiny_pipelines import T5_DIM, TINY_PIPELINES


def torchao(config: str) -> Callable[[nn.Module], None]:
    """Return what quantizes a module with a configuration of torchao."""

    def quantize(module: nn.Module) -> None:
        quantization: Any = pytest.importorskip("torchao.quantization")
        quantization.quantize_(module, getattr(quantization, config)())

    return quantize


def gguf(module: nn.Module) -> None:
    """Replace linears as loading a GGUF file into diffusers does."""
    files: Any = pytest.importorskip("gguf")
    linears: Any = pytest.importorskip("diffusers.quantizers.gguf.utils")
    for name, linear in list(module.named_modules()):
        if type(linear) is not nn.Linear or linear.in_features % 32:
            continue
        kind = files.GGMLQuantizationType.Q8_0
        packed = torch.from_numpy(files.quants.quantize(linear.weight.detach().numpy(), kind))
        made = linears.GGUFLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=torch.float32,
        )
        made.weight = linears.GGUFParameter(packed, quant_type=kind)
        made.bias = linear.bias
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, made)


#: ways to quantize a module
QUANTIZED: dict[str, Callable[[nn.Module], None]] = {
    "int8-weights": torchao("Int8WeightOnlyConfig"),
    "int8-dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "fp8-weights": torchao("Float8WeightOnlyConfig"),
    "gguf": gguf,
}


def quantized_pipeline(
    quantize: Callable[[nn.Module], None], dtype: torch.dtype = torch.float32
) -> Any:
    """Return a tiny pipeline of PixArt whose transformer is quantized."""
    made: Any = TINY_PIPELINES["pixart"][0]()
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        cross_attention_dim=32,
        caption_channels=T5_DIM,
    )
    made.transformer = randomize(transformer)
    made.to(dtype)
    with torch.no_grad():
        quantize(made.transformer)
    return made
