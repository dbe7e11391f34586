"""``ditfastattn validate``: what it prints and writes, and its exit code."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

import ditfastattn
from ditfastattn import Plan, Strategy, Target, Validation
from ditfastattn.passes.plan.calibration import PlannedTarget
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.search.judge.drift import Drift
from ditfastattn.runtime.search.judge.quality import Quality
from ditfastattn.runtime.search.measure.timing import PairedTiming, Timing
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for
from tests.shell import exit_code

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

F, S, W = Strategy.FULL, Strategy.SHARE_STEP, Strategy.WINDOW


class Files:
    """Hold the files of a test, and run the command on them."""

    def __init__(self, folder: Path) -> None:
        """Save a tiny pipeline, and a plan for it."""
        self.pipeline, self.out = folder / "pipeline", folder / "found.json"
        self.path = folder / "plan.json"
        call = {"class_labels": [0], "num_inference_steps": 4, "guidance_scale": 2.0}
        pipeline: Any = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
        pipeline.save_pretrained(self.pipeline)
        self.plan = plan_for(pipeline, call, (F, W, S, S), Target.min_ssim(0.5))
        self.plan.save(self.path)

    def search_for(self, name: str, bound: float, at_least: bool = True) -> None:
        """Write the plan with another target."""
        target = PlannedTarget(name=name, bound=bound, at_least=at_least)
        calibration = self.plan.calibration.model_copy(update={"target": target})
        self.plan.model_copy(update={"calibration": calibration}).save(self.path)

    def found(self) -> Any:
        """Read what the command wrote."""
        return json.loads(self.out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("validate"))


@pytest.fixture
def files(shared: Files) -> Files:
    shared.plan.save(shared.path)
    shared.out.unlink(missing_ok=True)
    return shared


def run(monkeypatch: pytest.MonkeyPatch, files: Files, *options: str, speed: bool = False) -> int:
    """Run the command as a shell does; return its exit code."""
    arguments = ["validate", str(files.path), "--pipeline", str(files.pipeline)]
    arguments += ["--out", str(files.out), "--classes", "0,1,2", "--lowering", "eager"]
    arguments += [] if speed else ["--no-speed"]
    return exit_code(monkeypatch, *arguments, *options)


def test_a_target_that_is_met_is_exit_code_0(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, files) == 0
    shown = capsys.readouterr().out
    assert "SSIM of at least 0.5 on the worst prompt: met" in shown
    assert "plan alone (planned eager)" in shown
    assert "compilation was not measured" in shown
    assert "speed was not measured" in shown
    found = files.found()
    assert (found["met"], found["timing"], found["lowering"]) == (True, None, "eager")
    assert found["seeds"] == [2000, 2001, 2002]
    assert [quality["name"] for quality in found["qualities"]] == ["ssim", "psnr"]
    assert found["drift"]["plan"] > 0.0


def test_missed_on_the_worst_prompt_though_met_on_the_mean_is_exit_code_1(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, files) == 0
    ssim = files.found()["qualities"][0]
    files.search_for("ssim", (ssim["worst"] + ssim["mean"]) / 2.0)
    assert run(monkeypatch, files) == 1
    assert "the plan misses the target" in capsys.readouterr().err
    found = files.found()  # a miss is written down as well
    assert found["met"] is False
    assert found["reached"] == found["qualities"][0]["worst"]
    assert found["qualities"][0]["mean"] > found["target"]["bound"]


def test_a_target_on_the_command_line_replaces_the_plans(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, files, "--min-psnr", "300") == 1
    assert files.found()["target"]["name"] == "psnr"
    assert "PSNR of at least 300 dB on the worst prompt: missed" in capsys.readouterr().out
    assert run(monkeypatch, files, "--min-psnr", "20", "--min-ssim", "0.9") == 2


def test_a_metric_of_the_users_own_takes_the_plans_bound(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def furthest(dense: torch.Tensor, planned: torch.Tensor) -> torch.Tensor:
        return (dense - planned).abs().amax((1, 2, 3))

    module: Any = types.ModuleType("users_metrics")
    module.furthest = furthest
    monkeypatch.setitem(sys.modules, "users_metrics", module)
    files.search_for("furthest", 1.0, at_least=False)
    assert run(monkeypatch, files) == 2
    assert "--metric package.module:function" in capsys.readouterr().err
    assert run(monkeypatch, files, "--metric", "users_metrics:furthest") == 0
    assert files.found()["target"] == {"name": "furthest", "bound": 1.0, "at_least": False}
    assert run(monkeypatch, files, "--metric", "users_metrics:furthest", "--at-most", "1e-9") == 1


def test_another_sampler_or_schedule_is_exit_code_2(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    later = tuple(time + 10.0 for time in files.plan.sampler.timesteps)
    sampler = files.plan.sampler.model_copy(update={"timesteps": later})
    files.plan.model_copy(update={"sampler": sampler}).save(files.path)
    assert run(monkeypatch, files) == 2
    assert "unexpected timestep at step" in capsys.readouterr().err
    sampler = files.plan.sampler.model_copy(update={"steps": 5, "timesteps": (*later, 0.0)})
    rows = (*files.plan.strategies, files.plan.strategies[-1])
    files.plan.model_copy(update={"sampler": sampler, "strategies": rows}).save(files.path)
    assert run(monkeypatch, files) == 2
    other: Any = DPMSolverMultistepScheduler()
    sampler = files.plan.sampler.model_copy(update={"scheduler": type(other).__name__})
    files.plan.model_copy(update={"sampler": sampler}).save(files.path)
    assert run(monkeypatch, files) == 2
    assert "plan.sampler.scheduler" in capsys.readouterr().err
    assert not files.out.exists()


def test_speed_is_timed_unless_told_otherwise(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--repetitions", "4", "--max-latency", "1000")
    assert run(monkeypatch, files, *options, speed=True) == 0
    assert "nothing compiled" in capsys.readouterr().out
    assert len(files.found()["timing"]["speedup"]["samples"]) == 4
    assert run(monkeypatch, files, *options) == 2  # a latency, and --no-speed


def test_every_number_of_a_compiled_run_is_shown_and_written(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, fast, ratio = (Timing(x, x - 0.5, x + 0.5, (x,) * 3) for x in (3.0, 1.5, 2.0))
    made = Validation(
        target=Target.min_speedup(1.9),
        seeds=(2000, 2001),
        qualities=(Quality("psnr", "PSNR", " dB", True, (float("inf"), 30.0)),),
        drift=Drift(plan=3e-4, compilation=1e-4, both=4e-4),
        timing=PairedTiming(slow, fast, ratio),
        lowering=Lowering.INDUCTOR,
    )
    monkeypatch.setattr(ditfastattn, "validate", lambda *_args, **_options: made)
    assert run(monkeypatch, files) == 0
    shown = capsys.readouterr().out
    for part in (
        "75.0% of the drift comes from the plan, 25.0% from compilation and precision",
        "planned compiled against dense eager",
        "speed, both compiled",
        "1.50x to 2.50x",
        "speedup of at least 1.9x: met (2)",
    ):
        assert part in shown
    found = files.found()
    assert found["qualities"][0]["values"] == ["inf", 30.0]  # JSON has no infinity
    assert found["drift"]["plan_share"] == pytest.approx(0.75)
    assert found["timing"]["speedup"]["median"] == 2.0


def test_the_plans_file_is_read_as_ever(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.path.write_text("{}", encoding="utf-8")
    assert run(monkeypatch, files) == 2
    files.plan.save(files.path)
    assert run(monkeypatch, files, "--classes", "one") == 2
    assert Plan.load(files.path) == files.plan
