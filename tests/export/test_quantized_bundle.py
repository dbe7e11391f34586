"""Bundles of quantized models compute what the models do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import ditfastattn
from ditfastattn import ConfigError, Strategy
from ditfastattn.passes.capture.plain_tensors import is_plain, parts
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.plans import plan_for
from tests.quantized import QUANTIZED, quantized_pipeline
from tests.tiers import slow_but
from tests.tiny_pipelines import TINY_PIPELINES
from tests.works_with import works_with

CALL: dict[str, Any] = {"num_inference_steps": 2, **TINY_PIPELINES["pixart"][1]}
PROMPT = Prompt(CALL, 5)


def planned(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    torch._dynamo.reset()
    made = quantized_pipeline(QUANTIZED[name], dtype)
    return made, plan_for(made, CALL, [Strategy.FULL, Strategy.SHARE_STEP])


@works_with(
    "Weights",
    "quantized: `export` as ONNX",
    "works",
    "weights quantized alone are stored as what they stand for; int8 products stay int8",
)
@pytest.mark.parametrize("name", slow_but({"int8-weights"}, QUANTIZED))
def test_a_bundle_of_a_quantized_model_computes_what_it_does(name: str, tmp_path: Path) -> None:
    pipeline, plan = planned(name)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    expected = generate(pipeline, PROMPT)
    ditfastattn.restore(pipeline)
    ditfastattn.export(pipeline, CALL, plan, tmp_path / "bundle")
    pipeline.transformer = ditfastattn.load(tmp_path / "bundle")
    # A rounding error may move an activation to the next of its 255 levels.
    tolerance = 0.02 if name == "int8-dynamic" else 1e-5
    assert float((generate(pipeline, PROMPT) - expected).abs().max()) < tolerance


@works_with(
    "Weights",
    "quantized: `export` as `.pt2`",
    "works",
    "weights are stored as they are quantized",
)
@pytest.mark.slow  # it compiles; the packages of other models are tested by default
@pytest.mark.parametrize("name", ["fp8-weights", "int8-dynamic"])  # weights, and products
def test_packages_of_a_quantized_model_compute_what_it_does(name: str, tmp_path: Path) -> None:
    pipeline, plan = planned(name)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    expected = generate(pipeline, PROMPT)
    ditfastattn.restore(pipeline)
    quantized = stored(pipeline.transformer)
    ditfastattn.export(
        pipeline, CALL, plan, tmp_path / "bundle", format="pt2", dynamic_batch=False, golden=False
    )
    with safe_open(tmp_path / "bundle" / "weights.safetensors", "pt") as weights:
        kept = {str(weights.get_tensor(key).dtype) for key in weights.keys()}  # noqa: SIM118  # no mapping
    assert quantized <= kept
    pipeline.transformer = ditfastattn.load(tmp_path / "bundle", runtime="aoti")
    # GGUF's weights are multiplied in fp16, which Inductor does not round.
    tolerance = 0.02 if name == "int8-dynamic" else 1e-5
    assert float((generate(pipeline, PROMPT) - expected).abs().max()) < tolerance


def stored(module: nn.Module) -> set[str]:
    """Return the dtypes that quantized weights are stored in."""
    weights = [weight for weight in module.parameters() if not is_plain(weight)]
    return {str(part.dtype) for weight in weights for _, part in parts(weight)}


@works_with(
    "Weights",
    "quantized: `export` in another dtype than the model's",
    "refused",
    "cast the model before it is quantized",
)
@pytest.mark.parametrize("name", slow_but((), QUANTIZED))
def test_a_quantized_model_is_not_cast(name: str, tmp_path: Path) -> None:
    pipeline, plan = planned(name)
    with pytest.raises(ConfigError, match=r"quantized[\s\S]*before it is quantized"):
        ditfastattn.export(pipeline, CALL, plan, tmp_path / "bundle", dtype="float16")


@pytest.mark.slow
def test_a_bundle_in_half_precision_holds_int8_products(tmp_path: Path) -> None:
    pipeline, plan = planned("int8-dynamic", torch.float16)
    ditfastattn.export(pipeline, CALL, plan, tmp_path / "bundle")
    ditfastattn.load(tmp_path / "bundle")
