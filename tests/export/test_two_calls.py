"""A bundle of a plan whose guidance calls the model twice a step computes what the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditfastattn import CfgLayout, ConfigError, Strategy, export, load, verify
from ditfastattn.export.bundle import export_model
from ditfastattn.export.capture_call import RecordedCall
from ditfastattn.export.options import ExportOptions
from ditfastattn.runtime.bundle.manifest import Manifest
from tests.helpers import TINY_MODELS, TinyModel, captured_once, largest_difference
from tests.plans import plan_for
from tests.runtime import test_separate_guidance as two_calls
from tests.runtime.test_pipelines import Pipeline
from tests.tiers import slow

F, W, C, E = Strategy.FULL, Strategy.WINDOW, Strategy.SHARE_CFG, Strategy.EXTRAPOLATE
R, S = Strategy.SHARE_CFG_REFRESH, Strategy.SHARE_STEP
FROM_THE_START, AFTER_FULL = (C, F, E, R, W, C), (F, C, S, R, W, E)
SEPARATE = CfgLayout.SEPARATE


def exported(
    tiny: TinyModel,
    rows: two_calls.Rows,
    out: Path,
    layout: CfgLayout = SEPARATE,
    options: ExportOptions | None = None,
) -> Manifest:
    first, second = (RecordedCall(two_calls.call(tiny, 0, lane)) for lane in range(2))
    plan = two_calls.plan_of(tiny, rows, layout)
    return export_model(tiny.model, first, plan, out, options, second=second)


@pytest.mark.parametrize(
    ("name", "layout", "seed"),
    [
        ("pixart", SEPARATE, 0),
        *map(slow, [("dit", SEPARATE, 1), ("sd3", SEPARATE, 2), ("sd3", SEPARATE, 3)]),
        slow(("dit", CfgLayout.SEPARATE_UNCOND_FIRST, 0)),
    ],
)
def test_a_bundle_of_two_calls_is_the_interpreters(
    name: str, layout: CfgLayout, seed: int, tmp_path: Path
) -> None:
    tiny = TINY_MODELS[name]()
    rows = two_calls.mixed(captured_once(tiny, two_calls.BATCH).every, seed, layout)
    manifest = exported(tiny, rows, tmp_path / "bundle", layout)
    assert manifest.second is not None
    bundle, expected = load(tmp_path / "bundle"), two_calls.reference(tiny, rows)
    assert largest_difference(two_calls.run(tiny, bundle), expected) < 1e-4
    assert largest_difference(two_calls.run(tiny, bundle), expected) < 1e-4  # a second generation
    found = verify(tmp_path / "bundle")
    assert found.passed
    assert len(found.step_errors) == 2 * len(rows)


@pytest.mark.parametrize("column", [FROM_THE_START, slow((AFTER_FULL,))])
def test_what_the_first_call_hands_over_is_taken(
    column: tuple[Strategy, ...], tmp_path: Path
) -> None:
    tiny = TINY_MODELS["dit"]()
    sites = captured_once(tiny, two_calls.BATCH).every
    rows = [
        tuple(F if strategy.needs_window and site.no_window else strategy for site in sites)
        for strategy in column
    ]
    exported(tiny, rows, tmp_path / "bundle", options=ExportOptions(golden=False))
    bundle, expected = load(tmp_path / "bundle"), two_calls.reference(tiny, rows)
    assert largest_difference(two_calls.run(tiny, bundle), expected) < 1e-4


@pytest.mark.parametrize("order", ["separate", slow("separate-uncond-first")])
def test_a_pipeline_of_two_calls_is_exported_with_its_sampler(order: str, tmp_path: Path) -> None:
    pipeline, call = Pipeline(order), {"labels": [1, 2]}
    steps = [F, C if order == "separate" else F, E, W]
    plan = plan_for(pipeline, call, steps)
    assert plan.sampler.cfg_layout == order
    manifest = export(pipeline, call, plan, tmp_path / "bundle", loop=True)
    assert manifest.stepping is not None
    assert manifest.golden
    for found in (verify(tmp_path / "bundle", pipeline, call), verify(tmp_path / "bundle")):
        assert found.passed
        assert 0.0 < found.loop_error < 1e-5
    assert 0.0 < found.latents_error < 1e-5


def test_a_second_call_is_needed_and_must_be_like_the_first(tmp_path: Path) -> None:
    tiny = TINY_MODELS["dit"]()
    rows = [(F,) * len(captured_once(tiny, two_calls.BATCH).every)] * 6
    plan = two_calls.plan_of(tiny, rows)
    first = two_calls.call(tiny, 0, 0)
    with pytest.raises(ConfigError, match="one call is known"):
        export_model(tiny.model, RecordedCall(first), plan, tmp_path / "bundle")
    other = RecordedCall({**first, "return_dict": True})
    with pytest.raises(ConfigError, match="differ in more than tensors"):
        export_model(tiny.model, RecordedCall(first), plan, tmp_path / "bundle", second=other)
    wide = RecordedCall({**first, "class_labels": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(ConfigError, match=r"class_labels.*other shapes"):
        export_model(tiny.model, RecordedCall(first), plan, tmp_path / "bundle", second=wide)
    assert not list(tmp_path.iterdir())
