"""Test the captions of the emoji model, and its pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditfastattn
from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.pipeline.guidance import detect_cfg_layout
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.tools.emoji.captions import Caption
from ditfastattn.tools.emoji.pipeline import EmojiPipeline, load_pipeline
from ditfastattn.tools.emoji.recipe import VOCABULARY
from tests.plans import mixed_plan_for
from tests.tools.tiny_emoji import SIZE, tiny_emoji_pipeline

PANDA = "a panda on blue, facing right"


@pytest.fixture
def pipeline() -> EmojiPipeline:
    return tiny_emoji_pipeline()


def draw(pipeline: EmojiPipeline, prompt: Any, seed: int = 0, **arguments: Any) -> Tensor:
    """Return the "pt" images of a two-step run."""
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"} | arguments
    settings.setdefault("generator", torch.Generator().manual_seed(seed))
    images: Tensor = pipeline(prompt, return_dict=False, **settings)[0]
    return images


def record_calls(pipeline: EmojiPipeline) -> list[dict[str, Tensor]]:
    """Return a list that collects the tensors of each transformer call."""
    calls: list[dict[str, Tensor]] = []

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        calls.append({"latents": args[0]} | kwargs)

    pipeline.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a panda on blue", Caption("panda", "blue", "left")),
        ("Panda on BLUE facing right.", Caption("panda", "blue", "right")),
        ("an elephant on a pink ground, facing left", Caption("elephant", "pink", "left")),
    ],
)
def test_captions_are_read(text: str, caption: Caption) -> None:
    assert VOCABULARY.parse(text) == caption


def test_each_caption_says_what_is_read_from_it() -> None:
    captions = VOCABULARY.captions()
    assert [VOCABULARY.parse(str(caption)) for caption in captions] == captions
    tokens = [VOCABULARY.tokens(caption) for caption in captions]
    assert len({tuple(each) for each in tokens}) == len(captions)
    assert all(VOCABULARY.null not in each for each in tokens)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a pandda on blue", r"(?s)prompt: the model knows no such thing.*did you mean 'panda'"),
        ("a sofa on blue", r"(?s)got: +'sofa'.*expected: panda, .*robot.*choose one of the things"),
        ("a panda on beige", "(?s)no such hue.*expected: red, "),
        ("a panda on blue, facing up", "(?s)no such direction.*expected: left, right"),
        ("a blue panda", "(?s)not a caption.*got: +'a blue panda'.*write it like 'a panda on red'"),
        (["a panda on blue", "a fox"], r"prompt\[1\]: the prompt is not a caption"),
        ([], "neither a caption nor a list"),
        (7, "neither a caption nor a list"),
        ([7], r"prompt\[0\]: the prompt is not a caption"),
    ],
)
def test_what_is_no_caption_is_refused_with_the_remedy(
    pipeline: EmojiPipeline, prompt: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline(prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps: .*out of range"),
        ({"guidance_scale": 0.5}, "guidance_scale: .*out of range"),
        ({"generator": [torch.Generator()] * 2}, "generator: .*\n.*2 generators\n.*1, one per"),
        ({"output_type": "jpeg"}, "expected: pt, np, pil"),
        (
            {"latents": torch.zeros(1, 3, 8, 8)},
            r"latents: .*\n.*\[1, 3, 8, 8\]\n.*\[1, 3, 16, 16\]",
        ),
    ],
)
def test_bad_arguments_are_named(
    pipeline: EmojiPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline(PANDA, **arguments)


def test_guidance_is_one_call_unconditional_half_first(pipeline: EmojiPipeline) -> None:
    calls = record_calls(pipeline)
    draw(pipeline, [PANDA, "a fox on red"], guidance_scale=2.5)
    assert len(calls) == 2
    embedding = pipeline.text_encoder.embedding.weight
    for call in calls:
        words = call["encoder_hidden_states"]
        assert words.shape[:2] == (4, 3)
        assert torch.equal(words[:2], embedding[-1].expand_as(words[:2]))
        assert not torch.equal(words[2], words[3])
        first, second = call["latents"].chunk(2)
        assert torch.equal(first, second)


def test_without_guidance_the_captions_run_alone(pipeline: EmojiPipeline) -> None:
    calls = record_calls(pipeline)
    draw(pipeline, PANDA, guidance_scale=1.0)
    assert [len(call["latents"]) for call in calls] == [1, 1]


def test_guidance_changes_the_picture_away_from_the_null_caption(pipeline: EmojiPipeline) -> None:
    seen: list[Tensor] = []
    transformer: Any = pipeline.transformer
    null = pipeline.text_encoder.embedding.weight[-1]

    def answer(module: torch.nn.Module, args: Any, kwargs: dict[str, Tensor], output: Any) -> None:
        conditional = (kwargs["encoder_hidden_states"] != null).any(2).any(1)
        output.sample[:] = conditional.float().view(-1, 1, 1, 1)

    transformer.register_forward_hook(answer, with_kwargs=True)
    step = pipeline.scheduler.step

    def watch(velocity: Tensor, *rest: Any) -> Any:
        seen.append(velocity)
        return step(velocity, *rest)

    pipeline.scheduler.step = watch
    draw(pipeline, PANDA, guidance_scale=2.5)
    assert [torch.unique(velocity).tolist() for velocity in seen] == [[2.5], [2.5]]


def test_each_word_matters(pipeline: EmojiPipeline) -> None:
    panda = draw(pipeline, PANDA)
    assert torch.equal(panda, draw(pipeline, PANDA))
    others = ("a fox on blue, facing right", "a panda on red, facing right", "a panda on blue")
    assert not any(torch.equal(panda, draw(pipeline, other)) for other in others)


def test_output_types_and_pictures_per_prompt(pipeline: EmojiPipeline) -> None:
    expected = draw(pipeline, PANDA, num_images_per_prompt=2)
    assert expected.shape == (2, 3, SIZE, SIZE)
    assert expected.min() >= 0.0
    assert expected.max() <= 1.0
    assert not torch.equal(expected[0], expected[1])
    pixels: Any = draw(pipeline, PANDA, num_images_per_prompt=2, output_type="np")
    assert torch.equal(torch.from_numpy(pixels).permute(0, 3, 1, 2), expected)
    pictures: Any = draw(pipeline, PANDA, output_type="pil")
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (SIZE, SIZE))]


def test_saved_pipeline_draws_the_same_in_silence(
    pipeline: EmojiPipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["ditfastattn.tools.emoji.text_encoder", "WordTable"]
    capfd.readouterr()
    loaded = load_pipeline(tmp_path)
    assert capfd.readouterr() == ("", "")
    loaded.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    assert loaded.vocabulary == VOCABULARY
    assert torch.equal(draw(loaded, PANDA), draw(pipeline, PANDA))


def test_absent_model_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)there is no emoji pipeline.*remedy:.*emoji\.train"):
        load_pipeline(tmp_path / "absent")


def test_guidance_is_seen_as_batched(pipeline: EmojiPipeline) -> None:
    call = {"prompt": PANDA, "num_inference_steps": 2}
    assert detect_cfg_layout(pipeline, call) is CfgLayout.UNCOND_FIRST


def test_the_guidance_halves_share_the_first_self_attention(pipeline: EmojiPipeline) -> None:
    outputs: list[list[Tensor]] = [[], []]
    blocks: Any = pipeline.transformer.transformer_blocks
    for block, kept in zip(blocks, outputs, strict=True):
        block.attn1.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
    draw(pipeline, PANDA)
    for out in outputs[0]:
        torch.testing.assert_close(*out.chunk(2), rtol=0, atol=1e-5)
    unconditional, conditional = outputs[1][-1].chunk(2)
    assert (unconditional - conditional).abs().max() > 1e-3  # what the captions change


def test_a_plan_runs_as_it_says(pipeline: EmojiPipeline) -> None:
    call = {"prompt": PANDA, "num_inference_steps": 4}
    dense = generate(pipeline, Prompt(call, 3))
    mixed = mixed_plan_for(pipeline, call)
    assert mixed.plan.changed > 0
    expected = mixed.interpret(pipeline, Prompt(call, 3))
    ditfastattn.accelerate(pipeline, mixed.plan, lowering="eager")
    torch.testing.assert_close(generate(pipeline, Prompt(call, 3)), expected, rtol=0, atol=1e-4)
    assert not torch.equal(expected, dense)
    ditfastattn.restore(pipeline)
    assert torch.equal(generate(pipeline, Prompt(call, 3)), dense)
