"""Texts of several lengths run by one plan: padded to one length, and hidden by a mask."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditfastattn
from ditfastattn import ConfigError, Plan
from ditfastattn.passes.plan.text import PaddedText
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.runtime.pipeline.text_padding import (
    TextPadder,
    pad_text,
    padded_text,
    text_of,
    text_padded,
)
from tests.exercises import exercises
from tests.plans import MixedPlan, mixed_plan_for
from tests.tiny_pipelines import TINY_PIPELINES, load_saved
from tests.works_with import works_with

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LENGTH = 32
PROMPTS = ("a cat", "a dog runs")  # with a negative prompt of yet another length
TEXT = PaddedText(argument="encoder_hidden_states", mask="encoder_attention_mask", length=4)


class Reader(nn.Module):
    """Add the mean of its text to what it denoises: of all tokens, or of those that are shown."""

    def __init__(self, heeds: bool) -> None:
        super().__init__()
        self.heeds = heeds
        self.scale = nn.Parameter(torch.ones(()))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        shown = torch.ones(encoder_hidden_states.shape[:2])
        if self.heeds and encoder_attention_mask is not None:
            shown = encoder_attention_mask.float()
        text = (encoder_hidden_states * shown[..., None]).sum(1) / shown.sum(1)[:, None]
        return self.scale * hidden_states + text[:, None]


@pytest.fixture(scope="module")
def qwen(pipelines: Path) -> tuple[Any, dict[str, Any]]:
    pipeline, call = load_saved("qwenimage", pipelines)
    return pipeline, {**call, "num_inference_steps": 4, "max_sequence_length": 64}


@pytest.fixture(scope="module")
def mixed(qwen: tuple[Any, dict[str, Any]]) -> MixedPlan:
    pipeline, call = qwen
    with text_padded(pipeline, LENGTH, check=True):
        return mixed_plan_for(pipeline, {**call, "prompt": PROMPTS[0]})


@works_with(
    "Other calls than the plan's",
    "prompts of any length, where the plan pads them (`text_length`)",
    "works",
    "one plan, one compiled graph and one bundle; the images are those without padding, to float "
    "rounding",
)
def test_prompts_of_other_lengths_run_by_one_plan(
    qwen: tuple[Any, dict[str, Any]], mixed: MixedPlan
) -> None:
    pipeline, call = qwen
    transformer = pipeline.transformer
    prompts = [Prompt({**call, "prompt": text}, 5) for text in PROMPTS]
    with text_padded(pipeline, LENGTH):
        expected = [mixed.interpret(pipeline, prompt) for prompt in prompts]
    dense = [generate(pipeline, prompt) for prompt in prompts]
    plan = Plan.parse(mixed.plan.model_dump_json())
    assert plan.text == PaddedText(
        argument="encoder_hidden_states", mask="encoder_hidden_states_mask", length=LENGTH
    )
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    for prompt, wanted, plain in zip(prompts, expected, dense, strict=True):
        got = generate(pipeline, prompt)
        assert float((got - wanted).abs().max()) < 1e-4
        assert float((got - plain).abs().max()) > 1e-3
    (report,) = ditfastattn.reports()
    assert report.plan == plan
    ditfastattn.restore(pipeline)
    assert padded_text(transformer) is None
    assert torch.equal(generate(pipeline, prompts[1]), dense[1])


def test_a_text_that_is_too_long_is_refused_by_its_length(
    qwen: tuple[Any, dict[str, Any]], mixed: MixedPlan
) -> None:
    pipeline, call = qwen
    ditfastattn.accelerate(pipeline, mixed.plan, lowering="eager")
    longer = Prompt({**call, "prompt": "a cat and " * 20}, 5)
    with pytest.raises(ConfigError, match=rf"inputs\.encoder_hidden_states[\s\S]*\({LENGTH}, "):
        generate(pipeline, longer)
    ditfastattn.restore(pipeline)


@pytest.mark.slow
def test_a_calibration_of_prompts_of_other_lengths_pads_them(
    qwen: tuple[Any, dict[str, Any]],
) -> None:
    pipeline, call = qwen
    several = {**call, "prompt": list(PROMPTS)}
    target = ditfastattn.Target.min_ssim(0.5)
    with pytest.raises(ConfigError, match="text_length"):
        ditfastattn.calibrate(pipeline, several, target=target, method="global")
    plan = ditfastattn.calibrate(
        pipeline, several, target=target, method="global", text_length=LENGTH
    )
    assert plan.text is not None
    assert plan.inputs["encoder_hidden_states"][0] == LENGTH
    assert padded_text(pipeline.transformer) is None


@exercises("ONNX", "qwenimage")
@pytest.mark.slow
def test_a_bundle_pads_what_it_is_called_with(
    qwen: tuple[Any, dict[str, Any]], mixed: MixedPlan, tmp_path: Path
) -> None:
    pipeline, call = qwen
    plan = mixed.plan
    original, prompt = pipeline.transformer, Prompt({**call, "prompt": PROMPTS[1]}, 5)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    expected = generate(pipeline, prompt)
    ditfastattn.restore(pipeline)
    short = {**call, "prompt": PROMPTS[0]}
    ditfastattn.export(pipeline, short, plan, tmp_path / "bundle", golden=False)
    assert ditfastattn.verify(tmp_path / "bundle", pipeline, short).passed
    pipeline.transformer = ditfastattn.load(tmp_path / "bundle")
    try:
        got = generate(pipeline, prompt)
    finally:
        pipeline.transformer = original
    assert float((got - expected).abs().max()) < 1e-4


def test_a_model_that_sees_the_padding_is_refused() -> None:
    call = {"hidden_states": torch.randn(2, 3, 8), "encoder_hidden_states": torch.randn(2, 2, 8)}
    for heeds in (True, False):
        model = Reader(heeds)
        plain = model(**call)
        pad_text(model, [TEXT], check=True)
        if heeds:
            assert torch.allclose(model(**call), plain, atol=1e-6)
            continue
        with pytest.raises(ConfigError, match=r"depends on the padding[\s\S]*equal length"):
            model(**call)


def test_a_copy_pads_as_well() -> None:
    call = {"hidden_states": torch.randn(2, 3, 8), "encoder_hidden_states": torch.randn(2, 2, 8)}
    model = Reader(heeds=False)
    pad_text(model, [TEXT])
    plain = Reader(heeds=False)(**call)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not torch.equal(copied(**call), plain)
        pad_text(copied, [])
        assert torch.equal(copied(**call), plain)
    assert padded_text(model) == TEXT


def test_a_text_is_padded_once_until_it_is_written_to() -> None:
    text, mask = torch.randn(1, 2, 8), torch.tensor([[1, 0]])
    padder = TextPadder([TEXT, TEXT.model_copy(update={"length": 9})])
    first = padder({"encoder_hidden_states": text, "encoder_attention_mask": mask})
    again = padder({"encoder_hidden_states": text, "encoder_attention_mask": mask})
    assert first["encoder_hidden_states"] is again["encoder_hidden_states"]
    assert first["encoder_attention_mask"].tolist() == [[1, 0, 0, 0]]
    text.zero_()
    written = padder({"encoder_hidden_states": text, "encoder_attention_mask": mask})
    assert not written["encoder_hidden_states"].any()
    unmasked = padder({"encoder_hidden_states": text})
    assert unmasked["encoder_attention_mask"].tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(("tokens", "length"), [(3, 4), (4, 4), (5, 9), (10, 10)])
def test_a_text_takes_the_shortest_length_that_holds_it(tokens: int, length: int) -> None:
    padder = TextPadder([TEXT, TEXT.model_copy(update={"length": 9})])
    padded = padder({"encoder_hidden_states": torch.randn(1, tokens, 8)})
    assert padded["encoder_hidden_states"].shape == (1, length, 8)


def test_plans_that_pad_otherwise_are_not_mixed(
    qwen: tuple[Any, dict[str, Any]], mixed: MixedPlan
) -> None:
    pipeline, _ = qwen
    plain = mixed.plan.model_copy(update={"text": None})
    with pytest.raises(ConfigError, match=r"plan\.text"):
        ditfastattn.accelerate(pipeline, [mixed.plan, plain], lowering="eager")


@pytest.mark.parametrize(("name", "length"), [("flux", 32), ("qwenimage", 0)])
def test_a_model_without_a_mask_is_refused(name: str, length: int) -> None:
    build, _ = TINY_PIPELINES[name]
    with pytest.raises(ConfigError, match=r"text_length[\s\S]*encoder_hidden_states"):
        text_of(build().transformer, length)
