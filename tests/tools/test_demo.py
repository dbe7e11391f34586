"""The demo, on a tiny untrained model with plans of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from typer.testing import CliRunner

from ditfastattn import ConfigError, Plan, Strategy, Target
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.search.estimate import usual_forwards
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.methods import Method
from ditfastattn.runtime.search.options import SearchOptions
from ditfastattn.tools.commands import app as cli
from ditfastattn.tools.demo import compile_ahead, plans, record, result, run
from ditfastattn.tools.embedded import EmbeddedModel, ModelName, embedded_model
from ditfastattn.tools.savings import Prices, Shortcut, saved_entries, savings
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for
from tests.tiers import slow_but
from tests.tools.test_figures import make_plan

CALL = {"num_inference_steps": 3, "guidance_scale": 2.0}
ROWS = {
    "strict": [Strategy.FULL, Strategy.WINDOW, Strategy.FULL],
    "middle": [Strategy.FULL, Strategy.SHARE_CFG, Strategy.SHARE_STEP],
    "loose": [Strategy.FULL, Strategy.SHARE_STEP, Strategy.SHARE_STEP],
}


def open_tiny() -> Any:
    torch.manual_seed(0)
    return tiny_digits_pipeline(DDIMScheduler(clip_sample=False))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """Return a tiny model that has taken the place of the embedded one, with three plans."""
    made = EmbeddedModel(
        key=ModelName.DIGITS,
        name="tiny",
        folder=tmp_path / "model",
        load=open_tiny,
        call=CALL,
        calibration={"class_labels": [1]},
        held_out={"class_labels": [2]},
        compared={"class_labels": [3, 4]},
        method=Method.AUTO,
        least_ssim=(0.99, 0.95, 0.85),
        obeyed="half of the images",
        reads_back=lambda images, call: torch.tensor(call["class_labels"]) == 3,
    )
    made.plans.mkdir(parents=True)
    for name, strategies in ROWS.items():
        call = {"class_labels": [1], **CALL}
        plan = plan_for(open_tiny(), call, strategies, Target.min_ssim(0.01))
        plan.save(made.plans / f"{name}.json")
    for module in (record, run, compile_ahead):
        monkeypatch.setattr(module, "embedded_model", lambda _: made)
    return made


def eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the demo compile nothing."""
    for name in ("dense_contender", "planned_contender"):
        make = getattr(run, name)

        def lowered(*arguments: Any, make: Callable[..., Any] = make) -> Any:
            return make(*arguments[:-1], Lowering.EAGER)

        monkeypatch.setattr(run, name, lowered)
    monkeypatch.setattr(run, "compiling_ahead", lambda *_: nullcontext())


@pytest.mark.parametrize("lowering", slow_but({Lowering.EAGER}, Lowering))
def test_three_recorded_plans_are_compared_with_dense(
    lowering: Lowering, model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    record.record(keep=True, images=2, demo=False, lowering=Lowering.EAGER)
    recorded = plans.recorded_plans(model)
    assert recorded is not None
    assert [each.name for each in recorded.plans] == list(ROWS)
    assert all(each.measured.prompts == 2 for each in recorded.plans)
    if lowering is Lowering.EAGER:
        eagerly(monkeypatch)
    out = tmp_path / "demo"
    found = run.run_demo(out, repetitions=3)
    assert (out / "first.png").exists()
    written = {path.name for path in out.iterdir()}
    assert {f"{name}.{kind}" for name in ROWS for kind in ("json", "png")} <= written
    data = json.loads((out / "result.json").read_text())
    assert list(data["plans"]) == list(ROWS)
    entries = {
        name: {kind: each["entries"] for kind, each in plan["saved"].items() if each["entries"]}
        for name, plan in data["plans"].items()
    }
    sites = len(Plan.load(out / "loose.json").sites)
    assert entries["loose"] == {Shortcut.STEP: 2 * sites}
    assert set(entries["strict"]) == {Shortcut.WINDOW}
    assert set(entries["middle"]) == {Shortcut.GUIDANCE, Shortcut.STEP}
    for outcome in found.outcomes:
        assert outcome.quality.ssim < 1.0  # planned images are not the dense ones
        pairs = zip(outcome.plan.strategies, outcome.given.errors, strict=True)
        for strategies, errors in pairs:
            for strategy, error in zip(strategies, errors, strict=True):
                assert error is not None
                assert (error > 0.0) is (strategy != Strategy.FULL)
        assert len(outcome.timing.speedup.samples) == 3
        counted = sum(saving.share for saving in outcome.saved[0])
        assert counted == pytest.approx(1.0 - outcome.flops_kept, abs=0.1)


def test_plans_of_other_weights_are_refused(model: EmbeddedModel) -> None:
    recorded = plans.RecordedPlans(weights="other", machine={}, plans=())
    (model.plans / plans.RECORD).write_text(recorded.model_dump_json())
    with pytest.raises(ConfigError, match="of other weights") as refused:
        plans.shipped_plans(model)
    assert "--calibrate" in str(refused.value)


@pytest.mark.parametrize("name", ModelName)
def test_the_shipped_plans_are_of_the_shipped_weights(name: ModelName) -> None:
    found = plans.shipped_plans(embedded_model(name))
    assert [each.name for each in found] == ["strict", "middle", "loose"]
    for each in found:
        target, held_out = each.plan.calibration.target, each.plan.calibration.held_out
        assert target is not None
        assert held_out is not None
        assert held_out.worst >= target.bound
        assert each.plan.changed > 0
        if each.record is not None:
            assert each.record.measured.prompts > 0


def test_plans_without_a_record_are_priced_by_the_demo(model: EmbeddedModel) -> None:
    assert plans.recorded_plans(model) is None
    assert [each.prices for each in plans.shipped_plans(model)] == [None] * 3


def test_a_skipped_step_saves_the_whole_step_once() -> None:
    plan = make_plan(sites=2, steps=4)
    prices = Prices(
        unit="flops",
        step=10.0,
        sites=({"full": 3.0, "window": 1.0}, {"full": 3.0, "share-step": 0.0}),
    )
    plan = plan.model_copy(
        update={
            "strategies": (
                (Strategy.FULL, Strategy.FULL),
                (Strategy.WINDOW, Strategy.FULL),
                (Strategy.FULL, Strategy.SHARE_STEP),
                (Strategy.FULL, Strategy.FULL),
            )
        }
    )
    assert saved_entries(plan, prices) == [[0, 0], [2, 0], [0, 3], [0, 0]]
    found = {each.shortcut: (each.entries, each.share) for each in savings(plan, prices)}
    assert found[Shortcut.WINDOW] == (1, 2 / 40)
    assert found[Shortcut.STEP] == (1, 3 / 40)
    assert found[Shortcut.GUIDANCE] == (0, 0.0)


def test_options_of_a_search_need_one() -> None:
    refused = CliRunner().invoke(cli.app, ["demo", "--min-ssim", "0.8"])
    assert isinstance(refused.exception, ConfigError)
    assert "--calibrate" in str(refused.exception)


def test_contenders_of_other_steps_are_refused_before_anything_runs() -> None:
    record = Path(__file__).parents[2] / "benchmarks/bench/digits-20.json"
    words = ["demo", "--model", "digits", "--calibrate", "--steps", "30", "--peers", str(record)]
    refused = CliRunner().invoke(cli.app, words)
    assert isinstance(refused.exception, ConfigError)
    assert "digits, 30 steps" in str(refused.exception)


def test_an_interrupted_demo_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_demo", interrupted)
    monkeypatch.setattr("sys.argv", ["/bin/ditfastattn", "demo", "--out", "a folder", "--restart"])
    ended = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path)])
    assert ended.exit_code == 130
    assert "to resume, run: ditfastattn demo --out 'a folder'\n" in ended.output


def test_identical_images_have_ssim_one_and_other_images_do_not() -> None:
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert result.compare_images(images, images.clone()).ssim == pytest.approx(1.0)
    half = (images + 0.1).clamp(0.0, 1.0)
    other = result.compare_images(images, half)
    assert other.worst_ssim <= other.ssim < 0.999
    assert other.psnr == pytest.approx(20.0, abs=1.0)  # an error of 0.1: -20 log10(0.1) = 20 dB


@pytest.mark.parametrize("name", ["strict", "middle", "loose"])
def test_a_search_of_sites_takes_about_as_long_as_estimated(name: str) -> None:
    """By the searches of the digits' plans: a session of as many sites and steps."""
    plan = Plan.load(embedded_model(ModelName.DIGITS).plans / f"{name}.json")
    target = plan.calibration.target
    assert target is not None
    assert plan.calibration.calibrated is not None
    assert plan.calibration.held_out is not None
    estimated = usual_forwards(
        cast(Session, SimpleNamespace(steps=plan.sampler.steps, sites=plan.sites)),
        SearchOptions(Target.min_ssim(target.bound), Method(plan.calibration.method)),
        plan.calibration.calibrated.prompts,
        plan.calibration.held_out.prompts,
    )
    assert 1 / 1.5 < estimated / plan.calibration.forwards < 1.5
