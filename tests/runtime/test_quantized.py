"""Plans of quantized models: as exact against the same model dense as those of any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import nn

import ditfastattn
from ditfastattn import ConfigError
from ditfastattn.passes.analysis.fingerprint import module_fingerprint
from ditfastattn.passes.capture.plain_tensors import parts
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.helpers import randomize
from tests.plans import mixed_plan_for
from tests.tiers import slow_but
from tests.tiny_pipelines import T5_DIM, TINY_PIPELINES
from tests.works_with import works_with

CALL: dict[str, Any] = {"num_inference_steps": 4, **TINY_PIPELINES["pixart"][1]}
PROMPT = Prompt(CALL, 5)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


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


QUANTIZED: dict[str, Callable[[nn.Module], None]] = {
    "int8-weights": torchao("Int8WeightOnlyConfig"),
    "int8-dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "fp8-weights": torchao("Float8WeightOnlyConfig"),
    "gguf": gguf,
}


def pipeline(quantize: Callable[[nn.Module], None]) -> Any:
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
    with torch.no_grad():
        quantize(made.transformer)
    return made


@works_with(
    "Weights",
    "quantized: torchao's int8 weights, int8 dynamic and fp8 weights; GGUF",
    "works",
    "exact against the same model dense",
)
@pytest.mark.parametrize("name", slow_but({"int8-weights", "gguf"}, QUANTIZED))
def test_a_quantized_model_runs_dense_and_by_a_plan(name: str) -> None:
    made = pipeline(QUANTIZED[name])
    expected = generate(made, PROMPT)
    ditfastattn.accelerate(made, lowering="eager", dense=True)
    assert torch.equal(generate(made, PROMPT), expected)
    ditfastattn.restore(made)
    mixed = mixed_plan_for(made, CALL)
    interpreted = mixed.interpret(made, PROMPT)
    ditfastattn.accelerate(made, mixed.plan, lowering="eager")
    planned = generate(made, PROMPT)
    assert float((planned - interpreted).abs().max()) < 1e-5
    assert float((planned - expected).abs().max()) > 1e-5


@pytest.mark.parametrize("name", slow_but({"int8-weights"}, QUANTIZED))
def test_the_fingerprint_is_of_the_quantized_weights(name: str) -> None:
    made = pipeline(QUANTIZED[name])
    plan = mixed_plan_for(made, CALL).plan
    whole = module_fingerprint(made.transformer)
    assert module_fingerprint(pipeline(QUANTIZED[name]).transformer) == whole
    unquantized = pipeline(lambda module: None)
    assert module_fingerprint(unquantized.transformer) != whole
    ditfastattn.accelerate(unquantized, plan, lowering="eager")
    with pytest.raises(ConfigError, match=r"plan\.model\."):
        generate(unquantized, PROMPT)
    ditfastattn.accelerate(made, plan, lowering="eager")
    generate(made, PROMPT)
    for parameter in made.transformer.parameters():
        for _, part in parts(parameter):
            part.data.zero_()
    with pytest.raises(ConfigError, match=r"plan\.model\.weights"):
        generate(made, PROMPT)
