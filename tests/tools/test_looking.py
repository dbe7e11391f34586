"""What shows a plan: its graphs, another plan beside it, the rewrite that breaks it, notebooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from typer.testing import CliRunner

from ditfastattn import ConfigError, Plan, Strategy, Target
from ditfastattn.core.env import FUEL, limited_fuel, read_knobs
from ditfastattn.tools.bisect import bisect_plan
from ditfastattn.tools.commands import app as cli
from ditfastattn.tools.plan_difference import plan_difference
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for
from tests.tools.test_figures import make_plan
from tests.tools.test_report import Structure

CALL = {"class_labels": [3], "num_inference_steps": 4, "guidance_scale": 2.0}
ROWS = [Strategy.FULL, Strategy.WINDOW, Strategy.SHARE_STEP, Strategy.SHARE_CFG]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    torch.manual_seed(0)
    made = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    made.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    return made


@pytest.fixture(scope="module")
def plan(pipeline: Any) -> Plan:
    return plan_for(pipeline, CALL, ROWS)


@pytest.fixture(scope="module")
def saved(pipeline: Any, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("looking")
    pipeline.save_pretrained(folder / "pipeline")
    plan.save(folder / "plan.json")
    return folder


def test_a_steps_graph_is_written_before_and_after_each_pass(saved: Path) -> None:
    arguments = ["inspect", str(saved / "plan.json"), "--pipeline", str(saved / "pipeline")]
    wanted = ["--graph", str(saved / "graphs"), "--step", "2", "--json"]
    result = CliRunner().invoke(cli.app, [*arguments, *wanted])
    assert result.exit_code == 0, result.output
    passes = json.loads(result.stdout)["passes"]
    assert passes[0]["pass"] == "reuse-outputs"
    changes = " ".join(each["changes"] for each in passes)
    assert "-2 scaled_dot_product_attention" in changes  # both attentions are shared at that step
    files = sorted(path.name for path in (saved / "graphs").iterdir())
    assert files[:2] == ["00-dense.svg", "00-dense.txt"]
    assert len(files) == 2 * (len(passes) + 1)
    for path in (saved / "graphs").glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert "transformer_blocks.0.attn1" in (saved / "graphs" / "00-dense.svg").read_text()
    refused = CliRunner().invoke(cli.app, [*arguments, *wanted[:2], "--step", "9"])
    assert isinstance(refused.exception, ConfigError)


def test_bisecting_finds_the_step_and_the_site_that_break_a_target(pipeline: Any) -> None:
    rows = [Strategy.FULL] * 4
    rows[2] = Strategy.SHARE_STEP  # the one step that changes anything
    plan = plan_for(pipeline, CALL, rows)
    found = bisect_plan(pipeline, plan, CALL, Target.min_psnr(200.0), seed=0)
    assert found.culprit is not None
    assert (found.culprit.step, found.culprit.rewrites) == (2, 1)
    assert (found.culprit.site, found.culprit.strategy) == (plan.sites[0].name, "share-step")
    assert found.culprit.after < 200.0 <= found.culprit.before
    met = bisect_plan(pipeline, plan, CALL, Target.min_psnr(1.0), seed=0)
    assert met.culprit is None
    with pytest.raises(ConfigError, match="only a quality"):
        bisect_plan(pipeline, plan, CALL, Target.min_speedup(2.0), seed=0)


def test_bisect_says_what_it_found(saved: Path) -> None:
    arguments = ["bisect", str(saved / "plan.json"), "--pipeline", str(saved / "pipeline")]
    found = CliRunner().invoke(cli.app, [*arguments, "--min-psnr", "200", "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["culprit"]["step"] == 1
    without = CliRunner().invoke(cli.app, arguments)
    assert isinstance(without.exception, ConfigError)  # the plan records no target


def test_fuel_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FUEL, "7")
    with limited_fuel(2):
        assert read_knobs().fuel == 2
    assert read_knobs().fuel == 7
    monkeypatch.delenv(FUEL)
    with limited_fuel(2):
        pass
    assert read_knobs().fuel == -1


def test_plans_that_do_the_same_do_not_differ(tmp_path: Path) -> None:
    plan = make_plan(sites=3, steps=6)
    again = plan.model_copy(
        update={"calibration": plan.calibration.model_copy(update={"seconds": 5.0})}
    )
    assert plan_difference(plan, again).same
    rows = [list(row) for row in plan.strategies]
    rows[5][1] = Strategy.FULL
    sampler = plan.sampler.model_copy(update={"guidance_scale": 3.0})
    other = plan.model_copy(update={"strategies": tuple(map(tuple, rows)), "sampler": sampler})
    found = plan_difference(plan, other)
    assert found.fields == {"sampler.guidance_scale": ("None", "3.0")}
    (entry,) = found.entries
    assert (entry.step, entry.site, entry.after) == (5, plan.sites[1].name, "full")
    for name, each in (("a", plan), ("b", again), ("c", other)):
        each.save(tmp_path / name)
    run = CliRunner()
    assert run.invoke(cli.app, ["diff", str(tmp_path / "a"), str(tmp_path / "b")]).exit_code == 0
    differing = run.invoke(cli.app, ["diff", str(tmp_path / "a"), str(tmp_path / "c"), "--json"])
    assert differing.exit_code == 1
    assert len(json.loads(differing.stdout)["entries"]) == 1


def test_a_notebook_shows_a_plan_as_a_map() -> None:
    plan = make_plan(sites=3, steps=9)
    page = Structure(plan._repr_html_())
    assert page.open == []
    assert plan.sites[0].name in page.text
    assert plan._repr_html_().count("<td title=") == 27
    assert "window + residual" in page.text
