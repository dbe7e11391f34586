"""A bundle of a plan with phases: each phase runs graphs for its rows, or calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditfastattn import ConfigError, Plan, Strategy, export, load, verify
from ditfastattn.export.tensorrt.options import BuildOptions, choose_layout
from ditfastattn.export.update_weights import update_weights
from ditfastattn.runtime.bundle.manifest import Manifest
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.runtime.tensorrt.engines import Layout
from tests.plans import MixedPlan
from tests.runtime.test_phases import CALL, Interval, mixed_plan
from tests.works_with import works_with

F, S, C = Strategy.FULL, Strategy.SHARE_STEP, Strategy.SHARE_CFG


def generated(pipeline: Any, bundle: Any, prompt: Prompt) -> Any:
    """Return what a generation by ``bundle`` gives."""
    pipeline.transformer = bundle
    return generate(pipeline, prompt)


def simple_plan(order: str, guided: range, column: Sequence[Strategy]) -> MixedPlan:
    """Return a plan with phases that takes ``column[step]`` at every site."""
    made = mixed_plan(order, guided)
    strategies = tuple((each,) * len(made.sites) for each in column)
    data = made.plan.model_copy(update={"strategies": strategies}).model_dump_json()
    return replace(made, plan=Plan.parse(data))


@works_with(
    "Guidance",
    "`export` of a plan with guidance for an interval only",
    "works",
    "ONNX with its loop, and `.pt2`; a batch of both branches must be free",
)
def test_a_bundle_with_phases_is_the_interpreters(tmp_path: Path) -> None:
    pipeline: Any = Interval("uncond-first", range(2, 4))
    made = simple_plan("uncond-first", range(2, 4), [F, S, F, C, F, S])
    prompt = Prompt({**CALL, "labels": [1, 3]}, 5)
    images = made.interpret(pipeline, prompt)
    manifest = export(pipeline, CALL, made.plan, tmp_path / "bundle", loop=True)
    assert manifest.stepping is not None
    assert manifest.schedule[0] == manifest.schedule[4]  # a graph takes any rows
    found = verify(tmp_path / "bundle")
    assert found.passed
    assert 0.0 < found.loop_error < 1e-5
    bundle = load(tmp_path / "bundle")
    for _ in range(2):
        got = generated(pipeline, bundle, prompt)
        assert float((got - images).abs().max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "guided"),
    [
        ("cond-first", range(3)),
        ("separate", range(1, 4)),
        ("separate-uncond-first", range(2, 6)),
    ],
    ids=["cutoff", "two-calls", "late"],
)
def test_all_strategies_in_phases_are_the_interpreters(
    order: str, guided: range, tmp_path: Path
) -> None:
    made, pipeline = mixed_plan(order, guided), Interval(order, guided)
    prompts = [Prompt({**CALL, "labels": labels}, 5) for labels in ([1], [1, 3])]
    wanted = [made.interpret(pipeline, prompt) for prompt in prompts]
    assert export(pipeline, CALL, made.plan, tmp_path / "bundle", loop=True).golden
    for found in (verify(tmp_path / "bundle", pipeline, CALL), verify(tmp_path / "bundle")):
        assert found.passed
        assert 0.0 < found.loop_error < 1e-5
    bundle = load(tmp_path / "bundle")
    for prompt, images in zip(prompts, wanted, strict=True):
        got = generated(pipeline, bundle, prompt)
        assert float((got - images).abs().max()) < 1e-4


@pytest.mark.slow
def test_weights_of_a_bundle_with_phases_are_replaced(tmp_path: Path) -> None:
    made, pipeline = mixed_plan("cond-first", range(3)), Interval("cond-first", range(3))
    export(pipeline, CALL, made.plan, tmp_path / "bundle")
    with torch.no_grad():
        for weight in pipeline.transformer.parameters():
            weight.mul_(0.9)
    update_weights(tmp_path / "bundle", pipeline, CALL)
    wanted = made.interpret(pipeline, Prompt(CALL, 5))
    got = generated(pipeline, load(tmp_path / "bundle", low_memory=True), Prompt(CALL, 5))
    assert float((got - wanted).abs().max()) < 1e-4


@pytest.mark.slow
def test_packages_with_phases_are_the_interpreters(tmp_path: Path) -> None:
    made = simple_plan("cond-first", range(2), [F, S, F, S, F, S])
    pipeline: Any = Interval("cond-first", range(2))
    prompt = Prompt({**CALL, "labels": [1, 3]}, 5)
    images = made.interpret(pipeline, prompt)
    out = tmp_path / "bundle"
    export(pipeline, CALL, made.plan, out, format="pt2")
    assert verify(out, runtime="aoti").passed
    got = generated(pipeline, load(out, runtime="aoti"), prompt)
    assert float((got - images).abs().max()) < 1e-4


def test_a_switch_has_one_batch_and_phases_have_two(tmp_path: Path) -> None:
    made, pipeline = (
        simple_plan("cond-first", range(3), [F, C, S, F, S, S]),
        Interval("cond-first", range(3)),
    )
    manifest = export(pipeline, CALL, made.plan, tmp_path / "bundle", golden=False)
    assert choose_layout(tmp_path, manifest, BuildOptions("sm89"))[0] is Layout.VARIANTS
    with pytest.raises(ConfigError, match="a switch has one batch"):
        choose_layout(tmp_path, manifest, BuildOptions("sm89", layout=Layout.SWITCH))
    for changes, reason in (
        ({"schema_version": 5}, "they need schema version 6"),
        ({"fixed_batch": 2}, "the batch is fixed"),
        ({"batch_multiple": 3}, "the batch has no halves"),
    ):
        with pytest.raises(ValueError, match=reason):
            Manifest.model_validate(manifest.model_dump() | changes)


def test_other_rows_than_the_phases_are_refused(tmp_path: Path) -> None:
    made, pipeline = (
        simple_plan("cond-first", range(3), [F, C, S, F, S, S]),
        Interval("cond-first", range(3)),
    )
    with pytest.raises(ConfigError, match=r"one batch[\s\S]*guidance none at steps 3-5"):
        export(pipeline, CALL, made.plan, tmp_path / "bundle", dynamic_batch=False)
    other = Interval("cond-first", range(2))
    with pytest.raises(ConfigError, match=r"1 row\(s\) at step 2[\s\S]*2 row\(s\) at steps 0-2"):
        export(other, CALL, made.plan, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
    export(pipeline, CALL, made.plan, tmp_path / "bundle", golden=False)
    bundle: Any = load(tmp_path / "bundle")
    other.transformer = bundle
    with pytest.raises(ConfigError, match=r"1 row\(s\) at step 2"):
        generate(other, Prompt(CALL, 5))
    pipeline.transformer = bundle
    assert generate(pipeline, Prompt(CALL, 5)).isfinite().all()  # what was refused leaves nothing
