"""Test the digits pipeline, its evaluation, and the export of its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor
from typer.testing import CliRunner

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.search.judge.judgement import metric_values
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.tools import digits_pipeline, digits_recipe, evaluate_digits, train_digits
from ditfastattn.tools.commands.target import load_metric
from ditfastattn.tools.digits_card import model_card
from ditfastattn.tools.digits_data import class_accuracy, digit_images
from ditfastattn.tools.digits_pipeline import DigitsPipeline, embedded_pipeline, load_pipeline
from ditfastattn.tools.evaluate_digits import classifier_accuracy, evaluate
from tests.helpers import TINY_DIGITS, tiny_digits_pipeline

SIZE = TINY_DIGITS["sample_size"]
NULL_CLASS = 10


@pytest.fixture
def pipeline() -> DigitsPipeline:
    """Return an untrained 16x16 pipeline, the same one each time."""
    return tiny_digits_pipeline(DPMSolverMultistepScheduler(**digits_recipe.SAMPLER))


def draw(pipeline: DigitsPipeline, labels: list[int], seed: int = 0, **arguments: Any) -> Tensor:
    """Return the "pt" images of a two-step run."""
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"} | arguments
    settings.setdefault("generator", torch.Generator().manual_seed(seed))
    images: Tensor = pipeline(labels, return_dict=False, **settings)[0]
    return images


def record_calls(pipeline: DigitsPipeline) -> list[dict[str, Tensor]]:
    """Return a list that collects the tensors of each transformer call."""
    calls: list[dict[str, Tensor]] = []

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        calls.append({"latents": args[0]} | kwargs)

    pipeline.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def test_images_are_one_channel_in_unit_range(pipeline: DigitsPipeline) -> None:
    images = draw(pipeline, [3, 7, 7])
    assert images.shape == (3, 1, SIZE, SIZE)
    assert images.dtype == torch.float32
    assert images.min() >= 0.0
    assert images.max() <= 1.0


def test_guidance_doubles_the_batch_conditional_half_first(pipeline: DigitsPipeline) -> None:
    calls = record_calls(pipeline)
    draw(pipeline, [3, 7], guidance_scale=2.0)
    assert len(calls) == 2
    for call in calls:
        assert call["class_labels"].tolist() == [3, 7, NULL_CLASS, NULL_CLASS]
        assert call["timestep"].shape == (4,)
        first, second = call["latents"].chunk(2)
        assert torch.equal(first, second)


def test_guidance_moves_away_from_the_second_half(
    pipeline: DigitsPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    step = pipeline.scheduler.step

    def answer(module: torch.nn.Module, args: Any, kwargs: dict[str, Tensor], output: Any) -> Any:
        conditional = (kwargs["class_labels"] != NULL_CLASS).float().view(-1, 1, 1, 1)
        output.sample = torch.ones_like(output.sample) * conditional
        return output

    def watch(noise: Tensor, timestep: Tensor, latents: Tensor, generator: Any = None) -> Any:
        seen.append(noise)
        return step(noise, timestep, latents)

    pipeline.transformer.register_forward_hook(answer, with_kwargs=True)
    monkeypatch.setattr(pipeline.scheduler, "step", watch)
    draw(pipeline, [3], guidance_scale=2.5)
    assert all(torch.equal(noise, torch.full_like(noise, 2.5)) for noise in seen)


def test_no_guidance_runs_the_conditional_lane_alone(pipeline: DigitsPipeline) -> None:
    calls = record_calls(pipeline)
    draw(pipeline, [3, 7], guidance_scale=1.0)
    assert [call["class_labels"].tolist() for call in calls] == [[3, 7], [3, 7]]


def test_a_seed_repeats_its_images(pipeline: DigitsPipeline) -> None:
    images = draw(pipeline, [3, 7], seed=5)
    assert torch.equal(images, draw(pipeline, [3, 7], seed=5))
    assert not torch.equal(images, draw(pipeline, [3, 7], seed=6))


def test_a_seed_repeats_the_noise_of_a_stochastic_scheduler(pipeline: DigitsPipeline) -> None:
    pipeline.scheduler = DDPMScheduler(**digits_recipe.SCHEDULE)
    assert torch.equal(draw(pipeline, [3], seed=5), draw(pipeline, [3], seed=5))


def test_a_generator_per_image_makes_it_independent_of_its_batch(pipeline: DigitsPipeline) -> None:
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = draw(pipeline, [3, 7], generator=seeds)
    alone = draw(pipeline, [7], generator=[torch.Generator().manual_seed(2)])
    # A batch of another size may take other kernels, whose rounding a generation adds up.
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-3)


def test_output_types(pipeline: DigitsPipeline) -> None:
    expected = draw(pipeline, [3])
    pixels: Any = draw(pipeline, [3], output_type="np")
    assert pixels.shape == (1, SIZE, SIZE, 1)
    assert torch.equal(torch.from_numpy(pixels).permute(0, 3, 1, 2), expected)
    pictures: Any = draw(pipeline, [3], output_type="pil")
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (SIZE, SIZE))]


def test_the_disabled_progress_bar_is_silent(
    pipeline: DigitsPipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    draw(pipeline, [3])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": []}, "class_labels: the class labels are not a list"),
        ({"class_labels": 3}, "class_labels: the class labels are not a list"),
        ({"class_labels": [3, 10]}, r"class_labels\[1\]: the model has no such class"),
        ({"class_labels": [-1]}, "from 0 to 9"),
        ({"class_labels": [True]}, "got:      True"),
        ({"class_labels": ["3"]}, "got:      '3'"),
        ({"num_inference_steps": 0}, "num_inference_steps: .*out of range"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"num_inference_steps": 2.5}, "got:      2.5"),
        ({"guidance_scale": 0.5}, "guidance_scale: .*out of range"),
        ({"guidance_scale": float("nan")}, "got:      nan"),
        ({"generator": [torch.Generator()]}, "generator: .*\n.*1 generators\n.*2, one per"),
        ({"output_type": "jpeg"}, "expected: pt, np, pil"),
    ],
)
def test_bad_arguments_are_named(
    pipeline: DigitsPipeline, arguments: dict[str, Any], message: str
) -> None:
    call: dict[str, Any] = {"class_labels": [1, 2], **arguments}
    with pytest.raises(ConfigError, match=message):
        pipeline(**call)


def test_saved_pipeline_draws_the_same(pipeline: DigitsPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == (
        "DigitsPipeline"
    )
    loaded = DigitsPipeline.from_pretrained(tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    assert type(loaded) is DigitsPipeline
    assert loaded.scheduler.config.thresholding
    assert torch.equal(draw(loaded, [3, 7]), draw(pipeline, [3, 7]))


def test_fp16_weights_load_as_fp32_in_silence(
    pipeline: DigitsPipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline.transformer.half()  # type: ignore[no-untyped-call]  # diffusers has no annotation
    pipeline.save_pretrained(tmp_path)
    capfd.readouterr()
    loaded = load_pipeline(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert {value.dtype for value in loaded.transformer.parameters()} == {torch.float32}


def test_absent_model_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_pipeline, "EMBEDDED_FOLDER", tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"(?s)absent: there is no.*remedy:.*train_digits"):
        embedded_pipeline()


def test_classifier_reads_held_out_digits() -> None:
    assert classifier_accuracy() > 0.97


def test_classifier_reads_digits_at_the_models_size() -> None:
    images, labels = digit_images(64)
    assert class_accuracy(images, labels) > 0.97
    assert class_accuracy(images, (labels + 1) % 10) < 0.03


def test_whether_the_digit_is_still_obeyed_is_a_target() -> None:
    images, labels = digit_images(32)
    three, seven = ((images[labels == digit][:1] + 1.0) / 2.0 for digit in (3, 7))
    dense, planned = torch.cat([three, three, seven, seven]), torch.cat([three, seven] * 2)
    metric = load_metric("ditfastattn.tools.embedded:still_obeyed")
    target = Target.quality(metric, at_least=1)
    assert metric_values(target, dense, planned, {"class_labels": [3] * 4}) == [1, 0, 1, 1]
    assert metric_values(target, dense, planned, {"class_labels": [7] * 4}) == [1, 1, 0, 1]
    assert target.describe() == "still_obeyed of at least 1 on the worst prompt"


def test_evaluation_of_an_untrained_model_is_a_number(pipeline: DigitsPipeline) -> None:
    result = evaluate(pipeline, images_per_class=2, steps=2)
    assert result.images == 20
    assert 0.0 <= result.accuracy < 0.6
    assert sum(result.class_accuracy) / 10 == pytest.approx(result.accuracy)
    assert result.scheduler == "DPMSolverMultistepScheduler"


def test_evaluation_of_nothing_is_refused(pipeline: DigitsPipeline) -> None:
    with pytest.raises(ConfigError, match="images_per_class: there are no images to judge"):
        evaluate(pipeline, images_per_class=0)


def test_evaluation_command_writes_json(pipeline: DigitsPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out.json")]
    ran = CliRunner().invoke(command(), [*arguments, "--steps", "1", "--images-per-class", "1"])
    assert ran.exit_code == 0, ran.output
    assert "classifier on held-out real digits" in ran.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["images"], written["steps"]) == (10, 1)


def test_evaluation_command_reports_an_absent_model(tmp_path: Path) -> None:
    ran = CliRunner().invoke(command(), ["--model", str(tmp_path)])
    assert ran.exit_code == 2
    assert "there is no digits pipeline here" in ran.stderr


def command() -> typer.Typer:
    """Return the evaluation as the command line has it."""
    app = typer.Typer()
    app.command()(evaluate_digits.run)
    return app


def test_finished_training_only_exports_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = tuple(
        digits_recipe.Stage(size, steps=2, batch=2, learning_rate=1e-3) for size in (8, 16)
    )
    out = tmp_path / "model"
    monkeypatch.setattr(train_digits, "MODEL_CONFIG", TINY_DIGITS)
    monkeypatch.setattr(train_digits, "STAGES", stages)
    monkeypatch.setattr("sys.argv", ["train", "--work", str(tmp_path / "work"), "--out", str(out)])
    train_digits.main()
    weights = out / "transformer" / "diffusion_pytorch_model.safetensors"
    first, card = weights.read_bytes(), (out / "README.md").read_text()
    weights.unlink()
    monkeypatch.setattr(train_digits, "training_loss", _must_not_train)
    train_digits.main()
    assert weights.read_bytes() == first
    assert (out / "README.md").read_text() == card
    assert {file.stat().st_mode & 0o777 for file in out.rglob("*.*")} == {0o644}
    assert draw(load_pipeline(out), [3]).shape == (1, 1, SIZE, SIZE)


def _must_not_train(*arguments: object) -> Tensor:
    raise AssertionError("a finished run trained again")


def test_model_card_names_data_training_and_use() -> None:
    card = model_card(parameters=4_605_508, loss=0.0123)
    assert card.startswith("---\nlicense: apache-2.0\n")
    for text in ("4.6 million", "1797", "1024 tokens", "0.0123", digits_pipeline.TRAIN_COMMAND):
        assert text in card
    for stage in digits_recipe.STAGES:
        assert f"| {stage.size}x{stage.size} | {stage.steps} | {stage.batch} |" in card


def test_full_model_is_small_enough_to_embed() -> None:
    parameters = sum(value.numel() for value in train_digits.build_model().parameters())
    assert 2 * parameters <= 11_500_000  # fp16 bytes; the folder may hold 12 MB


@pytest.mark.skipif(
    not digits_pipeline.EMBEDDED_FOLDER.exists(), reason="the embedded weights are not here"
)
@pytest.mark.slow
def test_embedded_model_draws_what_is_asked_for() -> None:
    folder = digits_pipeline.EMBEDDED_FOLDER
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 12_000_000
    pipeline = embedded_pipeline()
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    # Ten images at a fraction of the default steps: all ten must be right.
    assert evaluate(pipeline, images_per_class=1, steps=4).accuracy >= 0.95
