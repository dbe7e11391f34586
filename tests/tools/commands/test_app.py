"""The command line, on a tiny untrained pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from typer.testing import CliRunner

from ditfastattn import ConfigError, Plan, Strategy
from ditfastattn.runtime.search.measure.timing import measure_pairs, summarize
from ditfastattn.runtime.tensorrt.engines import ENGINES_FOLDER, read_engines
from ditfastattn.tools.commands import app as cli
from ditfastattn.tools.digits_data import class_accuracy
from ditfastattn.tools.digits_pipeline import DigitsPipeline, embedded_pipeline
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for


def tiny_pipeline() -> DigitsPipeline:
    return tiny_digits_pipeline(DDIMScheduler(clip_sample=False))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pipeline: Any = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_calibrate_writes_a_plan_that_inspect_shows(saved: Path, tmp_path: Path) -> None:
    plan, runner = tmp_path / "plan.json", CliRunner()
    arguments = ["--pipeline", str(saved), "--out", str(plan), "--classes", "1,2", "--steps", "3"]
    report = tmp_path / "report.html"
    wanted = ["--threshold", "0.3", "--report", str(report)]
    result = runner.invoke(cli.app, ["calibrate", *arguments, *wanted])
    assert result.exit_code == 0, result.output
    assert "What each shortcut saves" in report.read_text()
    assert "at most" in result.output  # the cost, before the search
    assert Plan.load(plan).sampler.scheduler == "DDIMScheduler"
    shown = runner.invoke(cli.app, ["inspect", str(plan)])
    assert shown.exit_code == 0
    assert "transformer_blocks.1.attn1" in shown.output
    assert "greedy, strength 0.3" in shown.output


def test_a_users_error_is_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ditfastattn", "inspect", "/nowhere/plan.json"])
    with pytest.raises(SystemExit, match="2"):
        cli.run()
    assert "cannot read the plan" in capsys.readouterr().err


def test_classes_must_be_numbers(saved: Path) -> None:
    arguments = ["calibrate", "--pipeline", str(saved), "--classes", "one"]
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, ConfigError)


def test_pairs_take_turns_and_ratios_are_paired() -> None:
    order: list[str] = []
    result = measure_pairs(lambda _: order.append("a"), lambda _: order.append("b"), 4)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(result.speedup.samples) == 4
    assert summarize([1.0, 2.0, 3.0]).median == 2.0


def test_a_plan_is_exported_and_the_bundle_verified(saved: Path, tmp_path: Path) -> None:
    plan, bundle, runner = tmp_path / "plan.json", tmp_path / "bundle", CliRunner()
    common = ["--pipeline", str(saved)]
    searched = ["calibrate", *common, "--out", str(plan), "--classes", "1", "--steps", "3"]
    assert runner.invoke(cli.app, [*searched, "--threshold", "0.3"]).exit_code == 0
    arguments = ["export", *common, "--plan", str(plan), "--out", str(bundle), "--loop"]
    exported = runner.invoke(cli.app, [*arguments, "--triton-repo", str(tmp_path / "models")])
    assert exported.exit_code == 0, exported.output
    assert "step variants for 3 steps" in exported.output
    assert (tmp_path / "models" / "bundle" / "1" / "model.onnx").is_file()
    verified = runner.invoke(cli.app, ["verify", str(bundle), *common])
    assert verified.exit_code == 0, verified.output
    assert "variant_00.onnx" in verified.output
    assert "the unrolled loop" in verified.output
    updated = runner.invoke(cli.app, ["update-weights", str(bundle), *common])
    assert updated.exit_code == 0, updated.output
    alone = runner.invoke(cli.app, ["verify", str(bundle)])
    assert alone.exit_code == 0, alone.output
    assert "golden sample" in alone.output
    (bundle / "weights.bin").write_bytes(b"")
    broken = runner.invoke(cli.app, ["verify", str(bundle), *common])
    assert isinstance(broken.exception, ConfigError)


DOCS = Path(__file__).parents[3] / "docs"
DEMO_PLAN = Path(__file__).parents[3] / "benchmarks" / "demo" / "plan.json"


def code_blocks(page: str, language: str = "") -> list[str]:
    """Return the code blocks of a page of docs/."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = [block.partition("\n") for block in text.split("```")[1::2]]
    return [code for kind, _, code in blocks if kind == language]


@pytest.mark.slow
def test_the_guide_leads_from_a_plan_to_a_digit_out_of_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search alone is left out: a plan of few step variants takes its place."""
    monkeypatch.chdir(tmp_path)
    plan = Plan.load(DEMO_PLAN)
    turns = tuple((s,) * len(plan.sites) for s in (Strategy.FULL, Strategy.SHARE_STEP))
    plan.model_copy(update={"strategies": turns * 10}).save(Path("plan.json"))
    shell, *_ = code_blocks("onnx.md")
    (script,) = [code for code in code_blocks("onnx.md", "python") if "three.png" in code]
    commands = [line.partition("#")[0].split() for line in shell.splitlines()]
    ours = [words[1:] for words in commands if words[:1] == ["ditfastattn"]]
    assert [words[0] for words in ours] == ["calibrate", "export", "verify"]
    assert ours[0][-2:] == ["--out", "plan.json"]
    for words in ours[1:]:
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, result.output
    exec(compile(script, "onnx.md", "exec"), {})
    pixels = torch.from_numpy(np.asarray(Image.open("three.png"))) / 255.0
    assert pixels.shape == (64, 64)
    assert class_accuracy(pixels[None, None].float() * 2.0 - 1.0, torch.tensor([3])) == 1.0


@pytest.mark.slow
def test_the_guide_leads_from_a_plan_to_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of four step variants takes the place of the search."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    commands = [line.split() for line in code_blocks("tensorrt.md")[0].splitlines()]
    ours = [words[1:] for words in commands if words[0] == "ditfastattn"]
    assert [words[0] for words in ours] == ["calibrate", "export", "build"]
    pipeline, steps = embedded_pipeline(), int(ours[0][ours[0].index("--steps") + 1])
    call = {"class_labels": [3], "num_inference_steps": steps, "guidance_scale": 2.0}
    turns = [Strategy.FULL, Strategy.WINDOW_SHARE_CFG, Strategy.SHARE_STEP, Strategy.SHARE_CFG]
    plan = plan_for(pipeline, call, (turns * steps)[:steps])
    plan = plan.model_copy(update={"merge_variants": True})
    plan.save(Path(ours[0][ours[0].index("--out") + 1]))
    for words in ours[1:]:
        torch._dynamo.reset()
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, result.output
    target = ours[2][ours[2].index("--target") + 1]
    engines = read_engines(Path("bundle") / ENGINES_FOLDER / target)
    assert len(engines.engines) >= 4
    assert all(spec.fused == spec.attentions and not spec.findings for spec in engines.engines)


def test_engines_are_built_right_after_the_export(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = str(tmp_path / "bundle")
    common = ["export", "--pipeline", str(saved), "--out", out, "--dtype", "float16"]
    refused = CliRunner().invoke(cli.app, [*common, "--layout", "switch"])
    assert isinstance(refused.exception, ConfigError)
    assert "--tensorrt" in str(refused.exception)
    wanted = ["--tensorrt", "--target", "sm89", "--layout", "loop"]
    plan = str(tmp_path / "plan.json")
    searched = ["calibrate", *common[1:3], "--out", plan, "--classes", "1", "--steps", "2"]
    assert CliRunner().invoke(cli.app, [*searched, "--threshold", "0.3"]).exit_code == 0
    result = CliRunner().invoke(cli.app, [*common, "--plan", plan, *wanted])
    assert result.exit_code == 0, result.output
    assert "layout loop: it was requested" in " ".join(result.output.split())
    engines = read_engines(Path(out) / ENGINES_FOLDER / "sm89")
    assert [spec.graph for spec in engines.engines] == ["loop.onnx"]
