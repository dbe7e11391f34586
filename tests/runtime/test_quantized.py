"""Plans of quantized models: as exact against the same model dense as those of any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ditfastattn
from ditfastattn import ConfigError, Strategy
from ditfastattn.passes.analysis.fingerprint import module_fingerprint
from ditfastattn.passes.capture.plain_tensors import parts
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.plans import mixed_plan_for, plan_for
from tests.quantized import QUANTIZED, quantized_pipeline
from tests.shared import digest
from tests.tiers import slow_but
from tests.tiny_pipelines import TINY_PIPELINES
from tests.works_with import works_with

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CALL: dict[str, Any] = {"num_inference_steps": 4, **TINY_PIPELINES["pixart"][1]}
PROMPT = Prompt(CALL, 5)


@works_with(
    "Weights",
    "quantized: torchao's int8 weights, int8 dynamic and fp8 weights; GGUF",
    "works",
    "exact against the same model dense",
)
@pytest.mark.parametrize("name", slow_but({"int8-weights", "gguf"}, QUANTIZED))
def test_a_quantized_model_runs_dense_and_by_a_plan(name: str) -> None:
    made = quantized_pipeline(QUANTIZED[name])
    expected = generate(made, PROMPT)
    ditfastattn.accelerate(made, lowering="eager", dense=True)
    assert torch.equal(generate(made, PROMPT), expected)
    ditfastattn.restore(made)
    mixed = mixed_plan_for(made, CALL)
    interpreted = mixed.interpret(made, PROMPT)
    ditfastattn.accelerate(made, mixed.plan, lowering="eager")
    planned = generate(made, PROMPT)
    assert float((planned - interpreted).abs().max()) < 1e-4
    assert float((planned - expected).abs().max()) > 1e-5


@works_with(
    "Weights",
    "quantized: compiled by Inductor",
    "works",
    "weights of int8 and GGUF; products of int8 and weights of fp8 by their packages",
)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gguf", "int8-weights"])
def test_a_quantized_model_is_compiled(name: str) -> None:
    made = quantized_pipeline(QUANTIZED[name])
    plan = plan_for(made, CALL, [Strategy.FULL, Strategy.SHARE_STEP] * 2)
    ditfastattn.accelerate(made, plan, lowering="eager")
    expected = generate(made, PROMPT)
    ditfastattn.accelerate(made, plan)
    assert float((generate(made, PROMPT) - expected).abs().max()) < 1e-3


def test_equal_integers_that_compute_otherwise_are_another_model() -> None:
    made = [nn.Sequential(nn.Linear(32, 32)) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    for model, name in zip(made, ("int8-weights", "int8-dynamic"), strict=True):
        QUANTIZED[name](model)
    one, other = map(module_fingerprint, made)
    assert one.weights == other.weights
    assert one.structure != other.structure
    assert digest(made[0]) != digest(made[1])  # so tests share no captures of them


@pytest.mark.parametrize("name", slow_but({"int8-weights"}, QUANTIZED))
def test_the_fingerprint_is_of_the_quantized_weights(name: str) -> None:
    made = quantized_pipeline(QUANTIZED[name])
    plan = mixed_plan_for(made, CALL).plan
    whole = module_fingerprint(made.transformer)
    assert module_fingerprint(quantized_pipeline(QUANTIZED[name]).transformer) == whole
    unquantized = quantized_pipeline(lambda module: None)
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
