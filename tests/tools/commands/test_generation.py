"""The command line opens any pipeline and asks for what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from typer.testing import CliRunner

from ditfastattn import ConfigError, Plan, accelerate
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.tools.commands import app as cli
from ditfastattn.tools.commands.generation import Generation, open_pipeline
from tests.plans import mixed_plan_for
from tests.tiny_pipelines import TINY_PIPELINES


class ByPrompt:
    def __call__(self, prompt: str, num_inference_steps: int = 20, height: int = 64) -> None: ...


class ByClass:
    def __call__(self, class_labels: list[int], guidance_scale: float = 4.0) -> None: ...


def test_conditions_are_those_that_the_pipeline_takes(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n\n  a lighthouse \n", encoding="utf-8")
    by_prompt = Generation(4, None, '{"height": 32}').arguments(ByPrompt(), "0", prompts)
    assert by_prompt == {
        "prompt": ["a fox", "a lighthouse"],
        "num_inference_steps": 4,
        "height": 32,
    }
    assert Generation(None, 2.0).arguments(ByClass(), "1,2", prompts) == {
        "class_labels": [1, 2],
        "guidance_scale": 2.0,
    }


@pytest.mark.parametrize(
    ("generation", "pipeline", "classes", "text", "message"),
    [
        (Generation(), ByPrompt(), "0", None, "needs prompts"),
        (Generation(), ByPrompt(), "0", "\n", "holds no prompt"),
        (Generation(), ByClass(), "one", None, "not integers"),
        (Generation(guidance=2.0), ByPrompt(), "0", "a", "does not take this argument"),
        (Generation(call="{"), ByPrompt(), "0", "a", "is not JSON"),
        (Generation(call="[1]"), ByPrompt(), "0", "a", "not a JSON object"),
    ],
)
def test_what_does_not_fit_is_refused(
    generation: Generation,
    pipeline: Any,
    classes: str,
    text: str | None,
    message: str,
    tmp_path: Path,
) -> None:
    prompts = None if text is None else tmp_path / "prompts.txt"
    if prompts is not None and text is not None:
        prompts.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        generation.arguments(pipeline, classes, prompts)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load the pipeline"):
        open_pipeline(str(tmp_path))
    with pytest.raises(ConfigError, match="unknown dtype"):
        open_pipeline("", dtype="int8")


def test_offloading_needs_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, arguments = TINY_PIPELINES["dit"]
    build().save_pretrained(tmp_path)
    folder = str(tmp_path)
    moved: list[str] = []
    original = DiffusionPipeline.enable_model_cpu_offload

    def to_cpu(pipeline: Any, gpu_id: int | None = None, device: Any = "cpu") -> None:
        moved.append(str(device))
        original(pipeline, device=device)

    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"--device offload[\s\S]*--device cpu"):
            open_pipeline(folder, device="offload")
    monkeypatch.setattr(DiffusionPipeline, "enable_model_cpu_offload", to_cpu)
    call = {**arguments, "num_inference_steps": 3}
    plain, offloaded = open_pipeline(folder, device="cpu"), open_pipeline(folder, device="offload")
    assert moved == ["cpu"]
    mixed = mixed_plan_for(offloaded, call)
    assert mixed.plan == mixed_plan_for(plain, call).plan
    expected = mixed.interpret(plain, Prompt(call, 0))
    accelerate(offloaded, mixed.plan, lowering="eager")
    moved.clear()
    got = generate(offloaded, Prompt(call, 0))
    assert moved  # a pipeline renews its hooks as a generation ends
    assert float((got - expected).abs().max()) < 1e-4


def text_to_image_arguments(folder: Path) -> list[str]:
    """Save a tiny pipeline and two prompts in ``folder``; return the options that name them."""
    build, call = TINY_PIPELINES["pixart"]
    build().save_pretrained(folder / "pixart")
    (folder / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    rest = {name: item for name, item in call.items() if name != "prompt"}
    common = ["--pipeline", str(folder / "pixart"), "--call", json.dumps(rest)]
    return [*common, "--prompts", str(folder / "prompts.txt")]


def test_a_text_to_image_pipeline_is_calibrated_validated_and_exported(tmp_path: Path) -> None:
    common = text_to_image_arguments(tmp_path)
    plan, bundle = tmp_path / "plan.json", tmp_path / "bundle"
    runner = CliRunner()
    arguments = ["calibrate", *common, "--out", str(plan), "--steps", "3", "--threshold", "0.5"]
    made = runner.invoke(cli.app, arguments)
    assert made.exit_code == 0, made.output
    assert Plan.load(plan).sampler.steps == 3
    arguments = ["validate", str(plan), *common, "--no-speed", "--min-psnr", "1"]
    checked = runner.invoke(cli.app, arguments)
    assert checked.exit_code == 0, checked.output
    arguments = ["export", *common, "--plan", str(plan), "--out", str(bundle)]
    exported = runner.invoke(cli.app, arguments)
    assert exported.exit_code == 0, exported.output
    verified = runner.invoke(cli.app, ["verify", str(bundle), *common])
    assert verified.exit_code == 0, verified.output


def test_whole_steps_are_calibrated_inspected_and_validated(tmp_path: Path) -> None:
    common = text_to_image_arguments(tmp_path)
    plan, runner = tmp_path / "plan.json", CliRunner()
    arguments = ["calibrate", *common, "--out", str(plan), "--steps", "6"]
    made = runner.invoke(cli.app, [*arguments, "--method", "whole-steps", "--min-psnr", "30"])
    assert made.exit_code == 0, made.output
    assert Plan.load(plan).calibration.method == "whole-steps"
    shown = runner.invoke(cli.app, ["inspect", str(plan)])
    assert "output" in shown.output
    checked = runner.invoke(cli.app, ["validate", str(plan), *common, "--no-speed"])
    assert checked.exit_code == 0, checked.output
    assert "PSNR" in checked.output


def test_a_folder_named_as_an_embedded_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    opened = open_pipeline("digits")
    assert "./digits" not in caplog.text
    opened.save_pretrained("digits")
    assert type(open_pipeline("digits")) is type(opened)
    assert "the folder is ./digits" in caplog.text
    caplog.clear()
    open_pipeline("./digits")
    assert "./digits" not in caplog.text
