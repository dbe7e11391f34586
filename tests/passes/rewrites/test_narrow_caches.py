"""Caches in half precision: golden text, and plans equal to rounding between the steps."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ditfastattn import CfgLayout, ConfigError, Plan, Strategy, Target, calibrate, load, reports
from ditfastattn.export.bundle import export_model
from ditfastattn.export.capture_call import RecordedCall
from ditfastattn.export.verify import _bounds
from ditfastattn.passes.analysis.site import CacheDtype
from ditfastattn.passes.graph.ir import clone, graph_text
from ditfastattn.passes.graph.slots import Slot
from ditfastattn.passes.plan.slot_schedule import SlotSchedule
from ditfastattn.passes.rewrites.eliminate_dead_code import EliminateDeadCode
from ditfastattn.passes.rewrites.narrow_caches import NarrowCaches
from ditfastattn.passes.rewrites.reuse_outputs import ReuseOutputs
from ditfastattn.passes.rewrites.store_caches import StoreCaches
from ditfastattn.runtime.caches import Caches
from ditfastattn.runtime.search.retarget import retarget
from tests.heads import head_plan, split
from tests.helpers import (
    TINY_MODELS,
    capture_every_site,
    compile_plan,
    largest_difference,
    make_plan,
    mixed_strategies,
    run_plan,
    tiny_digits_pipeline,
    tiny_dit,
    uniform_strategies,
)
from tests.passes.rewrites.test_rewrites import GOLDEN_INPUTS, after, block
from tests.tiers import slow_but

HALF = CacheDtype.FLOAT16


def test_golden_read() -> None:
    captured, site = block()
    passes = (
        ReuseOutputs(((site, Strategy.SHARE_STEP),)),
        NarrowCaches((site.with_caches_in(HALF),)),
    )
    assert after(captured, *passes, EliminateDeadCode()) == GOLDEN_INPUTS + (
        "%4 = input cache_attention_0_output_0: float16[2, 1, 16, 8]\n"
        "%5 = aten.to.dtype(%4, torch.float32): float32[2, 1, 16, 8]\n"
        "%6 = aten.mul.Tensor(%3, %5): float32[2, 1, 16, 8]\n"
        "return [%6]"
    )


def test_golden_write() -> None:
    captured, site = block()
    passes = StoreCaches((site,), ()), NarrowCaches((site.with_caches_in(CacheDtype.BFLOAT16),))
    assert after(captured, *passes) == GOLDEN_INPUTS + (
        "%4 = aten.linear.default(%1, %0): float32[2, 1, 16, 8]\n"
        "%5 = aten.scaled_dot_product_attention.default(%4, %1, %1): float32[2, 1, 16, 8]\n"
        "%6 = aten.linear.default(%5, %2): float32[2, 1, 16, 8]\n"
        "%7 = aten.mul.Tensor(%3, %6): float32[2, 1, 16, 8]\n"
        "%8 = aten.to.dtype(%6, torch.bfloat16): bfloat16[2, 1, 16, 8]\n"
        "return [%7, %8]"
    )


def test_numbers_stay_and_a_second_run_changes_nothing() -> None:
    captured, site = block()
    module = clone(captured.module)
    ReuseOutputs(((site, Strategy.EXTRAPOLATE),)).run(module)
    narrow = NarrowCaches((site.with_caches_in(HALF),))
    assert narrow.run(module).changed == 2
    text = graph_text(module.graph)
    assert "cache_attention_0_factor_0: float32[]" in text
    assert "cache_attention_0_output_0_1: float16" in text
    assert narrow.run(module).changed == 0
    assert graph_text(module.graph) == text


@pytest.mark.parametrize("kept", [None, HALF])
def test_near_misses(kept: CacheDtype | None) -> None:
    captured, site = block()
    module = clone(captured.module)
    if kept:  # the model computes in 16 bits itself
        for node in module.graph.nodes:
            if isinstance(node.meta.get("val"), Tensor):
                node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    StoreCaches((site,), (site,)).run(module)
    assert NarrowCaches((site.with_caches_in(kept),)).run(module).changed == 0


def narrowed(plan: Plan, dtype: CacheDtype = HALF) -> Plan:
    sites = tuple(site.model_copy(update={"cache_dtype": dtype}) for site in plan.sites)
    return Plan.parse(plan.model_copy(update={"sites": sites}).model_dump_json())


def rounding(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Round what a plan in the model's own dtype keeps."""
    write = Caches.write

    def rounded(
        caches: Caches, schedule: SlotSchedule, step: int, values: Mapping[Slot, Tensor]
    ) -> None:
        write(caches, schedule, step, {slot: v.to(dtype).to(v.dtype) for slot, v in values.items()})

    monkeypatch.setattr(Caches, "write", rounded)


@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_but(
        {("dit", HALF), ("pixart", CacheDtype.BFLOAT16), ("sd3", HALF)},
        product(TINY_MODELS, CacheDtype),
    ),
)
def test_a_plan_equals_rounding_between_the_steps(
    name: str, dtype: CacheDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = TINY_MODELS[name]()
    _, sites = capture_every_site(tiny)
    rows = mixed_strategies(sites, seed=3)
    plan = make_plan(tiny, rows, CfgLayout.COND_FIRST, feed_forwards=True)
    found = run_plan(tiny, narrowed(plan, dtype))
    exact = run_plan(tiny, plan)
    rounding(monkeypatch, getattr(torch, dtype))
    expected = run_plan(tiny, plan)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert 0 < largest_difference(found, exact) < (2e-3 if dtype is HALF else 2e-2)


def test_groups_of_heads_keep_less_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_dit(heads=4)
    rows = uniform_strategies(split(tiny, 2).every, Strategy.SHARE_STEP)
    plan = head_plan(tiny, 2, rows)
    model = compile_plan(tiny, narrowed(plan))
    found = tiny.run(model)
    (report,) = reports_of(narrowed(plan))
    wide = compile_plan(tiny, plan)
    exact = tiny.run(wide)
    (whole,) = reports_of(plan)
    assert report.peak_cache_bytes * 2 == whole.peak_cache_bytes > 0
    rounding(monkeypatch, torch.float16)
    expected = run_plan(tiny, plan)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert largest_difference(found, exact) < 2e-3


def reports_of(plan: Plan) -> list[Any]:
    return [report for report in reports() if report.plan == plan]


def test_a_bundle_keeps_what_the_plan_says(tmp_path: Path) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    rows = mixed_strategies(sites, seed=3)
    plan = narrowed(make_plan(tiny, rows, CfgLayout.COND_FIRST, feed_forwards=True))
    torch._dynamo.reset()
    manifest = export_model(tiny.model, RecordedCall(tiny.call(0, 4)), plan, tmp_path / "bundle")
    dtypes = {slot.dtype for slot in manifest.slots if not slot.name.startswith("invariant/")}
    assert dtypes == {"float16"}
    assert _bounds(manifest) == (5e-3, 50.0)  # what a rounded cache allows; fp32 alone 1e-4
    found = tiny.run(load(tmp_path / "bundle"))
    assert largest_difference(found, run_plan(tiny, plan)) < 2e-3


CALL: dict[str, Any] = {"class_labels": [1, 3], "num_inference_steps": 5, "guidance_scale": 2.0}


def test_a_search_plans_it_and_a_retargeted_plan_keeps_it() -> None:
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    options: dict[str, Any] = {"target": Target.min_ssim(0.2), "objective": "flops"}
    options["method"] = "global"
    plan = calibrate(pipeline, CALL, **options, lowering="eager")
    half = calibrate(pipeline, CALL, **options, lowering="eager", cache_dtype="float16")
    assert {site.cache_dtype for site in half.sites} == {HALF}
    assert "cache_dtype" not in plan.model_dump_json()
    assert half.strategies == plan.strategies
    assert half.calibration.cache_bytes * 2 == plan.calibration.cache_bytes > 0
    again = retarget(pipeline, half, CALL, target=Target.min_ssim(0.001))
    assert again.sites == half.sites


def test_a_model_of_16_bits_has_nothing_to_narrow() -> None:
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    pipeline.transformer.bfloat16()
    with pytest.raises(ConfigError, match=r"as much memory(.|\n)*got: +float16(.|\n)*bfloat16"):
        calibrate(pipeline, CALL, target=Target.min_ssim(0.2), cache_dtype="float16")
