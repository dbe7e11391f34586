"""The targets of the command line, and searches with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from typer.testing import CliRunner, Result

from ditfastattn import ConfigError, Plan, Target, TargetMissedError
from ditfastattn.tools import benchmark_search, digits_pipeline
from ditfastattn.tools.commands import app as cli
from ditfastattn.tools.commands.target import chosen_target
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from tests.helpers import tiny_digits_pipeline

NONE = (None, None, None, None, None, None, None, None, None)


def tiny_pipeline() -> DigitsPipeline:
    return tiny_digits_pipeline(DDIMScheduler(clip_sample=False))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pipeline: Any = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def calibrate(saved: Path, out: Path, *options: str) -> Result:
    arguments = ["--pipeline", str(saved), "--out", str(out), "--classes", "1,2"]
    arguments += ["--held-out", "3", "--steps", "4", "--objective", "attention-flops"]
    return CliRunner().invoke(cli.app, ["calibrate", *arguments, *options])


def closeness(dense: torch.Tensor, planned: torch.Tensor) -> torch.Tensor:
    return -(dense - planned).abs().flatten(1).mean(1)


@pytest.mark.parametrize(
    ("position", "bound", "expected"),
    [
        (0, 0.9, Target.min_ssim(0.9)),
        (1, 30.0, Target.min_psnr(30.0)),
        (2, 0.1, Target.max_lpips(0.1)),
        (3, 0.1, Target.max_flip(0.1)),
        (4, 0.1, Target.max_feature_distance(0.1)),
        (5, 25.0, Target.min_clip_score(25.0)),
        (6, 1.5, Target.min_speedup(1.5)),
        (7, 2.0, Target.max_latency(2.0)),
        (8, 0.1, Target.threshold(0.1)),
    ],
)
def test_each_option_is_its_target(position: int, bound: float, expected: Target) -> None:
    given: Any = [*NONE, "", None, None]
    given[position] = bound
    assert chosen_target(*given) == expected


def test_a_metric_is_imported_by_name() -> None:
    name = f"{__name__}:closeness"
    target = chosen_target(*NONE, name, -0.1, None)
    assert target is not None
    assert (target.name, target.bound, target.at_least) == ("closeness", -0.1, True)
    assert chosen_target(*NONE, "", None, None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.9, 30.0, *NONE[2:], "", None, None), "one target"),
        ((0.9, *NONE[1:], "math:floor", 0.1, None), r"one target[\s\S]*--metric"),
        ((*NONE, "", 0.1, None), "this bound has no metric"),
        ((*NONE, "math:nothing", 0.1, None), "cannot import the metric"),
        ((*NONE, "nowhere.at.all:x", 0.1, None), "cannot import the metric"),
        ((*NONE, "math", 0.1, None), "cannot import the metric"),
        ((*NONE, "math:floor", None, None), "exactly one of at_least and at_most"),
        ((1.5, *NONE[1:], "", None, None), "out of range"),
    ],
)
def test_what_makes_no_target_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen_target(*arguments)


def test_a_search_prints_estimate_and_outcome_and_writes_the_plan(
    saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    result = calibrate(saved, out, "--min-psnr", "40", "--max-variants", "2")
    assert result.exit_code == 0, result.output
    for part in ("at most", "target: psnr >= 40", "held-out prompts: worst of 1", "wrote"):
        assert part in result.output
    plan = Plan.load(out)
    assert plan.calibration.held_out is not None
    assert plan.calibration.held_out.worst >= 40.0
    assert len(set(plan.strategies)) <= 2
    shown = CliRunner().invoke(cli.app, ["inspect", str(out)])
    assert "psnr >= 40" in shown.output
    assert "predicted" in shown.output


def test_a_plan_is_retargeted_to_another_file_only(saved: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "plan.json", tmp_path / "other.json"
    assert calibrate(saved, out, "--min-psnr", "30", "--method", "global").exit_code == 0
    result = calibrate(saved, other, "--retarget", str(out), "--steps", "6")
    assert result.exit_code == 0, result.output
    plan = Plan.load(other)
    assert (plan.sampler.steps, plan.calibration.method) == (6, "retarget")
    refused = calibrate(saved, out, "--retarget", str(out), "--steps", "6")
    assert isinstance(refused.exception, ConfigError)
    assert "would be overwritten" in str(refused.exception)
    missed = calibrate(saved, tmp_path / "no.json", "--retarget", str(out), "--min-psnr", "150")
    assert isinstance(missed.exception, TargetMissedError)
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(("error", "code"), [(TargetMissedError, 1), (ConfigError, 2)])
def test_a_missed_target_is_exit_code_1_and_bad_input_2(
    error: type[ConfigError],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error("it went wrong")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.run()
    assert caught.value.code == code
    assert "it went wrong" in capsys.readouterr().err


def test_the_benchmark_compares_methods_at_equal_flops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits_pipeline, "embedded_pipeline", tiny_pipeline)
    monkeypatch.setattr(benchmark_search, "GREEDY_THRESHOLDS", (0.05, 0.3))
    monkeypatch.setattr(benchmark_search, "PER_STEP_BUDGETS", (0.01,))
    result = CliRunner().invoke(
        benchmark_search.app, ["--out", str(tmp_path), "--steps", "4", "--images", "2"]
    )
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert names == ["curve.json", "curve.png"]
    data = json.loads((tmp_path / "curve.json").read_text())
    points = data["points"]
    by_method: dict[str, list[Any]] = {}
    for point in points:
        by_method.setdefault(point["method"], []).append(point)
    assert {name: len(found) for name, found in by_method.items()} == {
        "greedy": 2,
        "per-step": 1,
        "global": 3,
    }
    others = by_method["greedy"] + by_method["per-step"]
    for other, ours in zip(others, by_method["global"], strict=True):
        assert ours["attention_flops"] <= other["attention_flops"] + 1e-9
        assert ours["matches"] == f"{other['method']} {other['strength']:g}"
        assert len(ours["ssims"]) == 2
    for comparison, other, ours in zip(
        data["comparisons"], others, by_method["global"], strict=True
    ):
        assert comparison["difference"] == pytest.approx(ours["ssim"] - other["ssim"])
        assert 0 <= comparison["better_on"] <= comparison["images"] == 2


def test_heads_are_grouped_on_request(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    arguments = ["--head-groups", "2", "--min-ssim", "0.5", "--method", "global"]
    result = calibrate(saved, out, *arguments)
    assert result.exit_code == 0, result.output
    groups = Plan.load(out).head_groups
    assert groups == {f"transformer_blocks.{i}.attn1": (1, 1) for i in range(2)}
