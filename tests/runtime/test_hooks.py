"""Hooks of diffusers around a transformer and its parts, before and after ``accelerate``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.group_offloading import apply_group_offloading
from diffusers.hooks.hooks import HookRegistry, ModelHook
from diffusers.hooks.pyramid_attention_broadcast import (
    PyramidAttentionBroadcastConfig,
    apply_pyramid_attention_broadcast,
)
from torch import nn

import ditfastattn
from ditfastattn import ConfigError, Plan, Target
from ditfastattn.passes.analysis.fingerprint import module_fingerprint
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.helpers import attentive_pipeline
from tests.plans import opaque_plan_for, plan_for
from tests.three_steps import CALL, STRATEGIES, run
from tests.tiers import slow_but
from tests.tiny_pipelines import TINY_PIPELINES
from tests.works_with import works_with

HOOK = "tests"


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


class Counting(ModelHook):
    """Count the calls of a module."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # diffusers
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


class Replacing(Counting):
    """Count the calls too, in place of the module's forward."""

    def new_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        reference: Any = self.fn_ref
        return reference.original_forward(*args, **kwargs)


@works_with(
    "Hooks and offloading",
    "a hook of diffusers around the whole transformer, before or after `accelerate`",
    "works",
    "the plan runs beneath it",
)
@pytest.mark.parametrize("kind", slow_but({Replacing}, [Counting, Replacing]))
@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("removed_first", [True, False])
def test_a_plan_runs_beneath_a_hook_and_is_restored(
    kind: type[Counting], hooked_first: bool, removed_first: bool, plan: Plan
) -> None:
    pipeline = attentive_pipeline()
    dense = run(pipeline)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    expected = run(pipeline)
    assert not torch.equal(expected, dense)
    registry = HookRegistry.check_if_exists_or_initialize(pipeline.transformer)
    if hooked_first:
        ditfastattn.restore(pipeline)
    hook = kind()
    registry.register_hook(hook, HOOK)
    if hooked_first:
        ditfastattn.accelerate(pipeline, plan, lowering="eager")
    assert torch.equal(run(pipeline), expected)
    assert hook.calls == len(STRATEGIES)
    if removed_first:
        registry.remove_hook(HOOK)
        assert torch.equal(run(pipeline), expected)
    ditfastattn.restore(pipeline)
    assert torch.equal(run(pipeline), dense)
    if not removed_first:
        registry.remove_hook(HOOK)
        assert torch.equal(run(pipeline), dense)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    assert torch.equal(run(pipeline), expected)


def test_a_plan_is_restored_beneath_what_is_not_known(plan: Plan) -> None:
    pipeline: Any = attentive_pipeline()
    dense = run(pipeline)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    inner = pipeline.transformer.forward
    pipeline.transformer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert not torch.equal(run(pipeline), dense)
    ditfastattn.restore(pipeline)
    assert torch.equal(run(pipeline), dense)


def offload_blocks(transformer: Any) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(transformer, cpu, cpu, "block_level", num_blocks_per_group=1)


def offload_leaves(transformer: Any) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(transformer, cpu, cpu, "leaf_level")


def cast_layers(transformer: Any) -> None:
    transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


PARTS = {"group-block": offload_blocks, "group-leaf": offload_leaves, "casting": cast_layers}


@works_with(
    "Hooks and offloading",
    "group offloading (blocks, leaves), layerwise casting (fp8 storage): whole-step plans",
    "works",
    "calibrate with the hooks in place",
)
@pytest.mark.parametrize("parts", PARTS)
def test_whole_steps_run_with_hooks_of_parts(parts: str) -> None:
    pipeline = attentive_pipeline()
    PARTS[parts](pipeline.transformer)
    dense = run(pipeline)
    plan = opaque_plan_for_hooked(pipeline)
    ditfastattn.accelerate(pipeline, plan)
    planned = run(pipeline)
    assert not torch.equal(planned, dense)
    assert torch.equal(run(pipeline), planned)
    ditfastattn.restore(pipeline)
    assert torch.equal(run(pipeline), dense)


def opaque_plan_for_hooked(pipeline: Any) -> Plan:
    plan = opaque_plan_for(attentive_pipeline(), CALL, STRATEGIES)
    return plan.model_copy(update={"model": module_fingerprint(pipeline.transformer)})


@works_with(
    "Hooks and offloading",
    "group offloading or layerwise casting before `accelerate`: plans of sites",
    "refused",
    "a graph cannot move or cast weights part by part",
)
@pytest.mark.parametrize("parts", PARTS)
def test_hooks_of_parts_are_refused_by_plans_of_sites(parts: str, captured: Plan) -> None:
    pipeline = attentive_pipeline()
    PARTS[parts](pipeline.transformer)
    with pytest.raises(ConfigError, match=r"part by part[\s\S]*whole-steps"):
        ditfastattn.accelerate(pipeline, captured, lowering="eager")


@works_with(
    "Hooks and offloading",
    "group offloading or layerwise casting after `accelerate`: plans of sites",
    "refused",
    "as the next generation begins; `restore` leaves the hooks",
)
@pytest.mark.parametrize("parts", PARTS)
def test_hooks_that_come_later_are_refused_as_a_generation_begins(
    parts: str, captured: Plan
) -> None:
    pipeline = attentive_pipeline()
    ditfastattn.accelerate(pipeline, captured, lowering="eager")
    run(pipeline)
    PARTS[parts](pipeline.transformer)
    with pytest.raises(ConfigError, match=r"part by part[\s\S]*whole-steps"):
        run(pipeline)
    ditfastattn.restore(pipeline)
    hooked = attentive_pipeline()
    PARTS[parts](hooked.transformer)
    assert torch.equal(run(pipeline), run(hooked))


def cached(transformer: Any) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    apply_pyramid_attention_broadcast(transformer, config)


@works_with(
    "Hooks and offloading",
    "`enable_cache()` before `accelerate`",
    "refused",
    "a plan takes its place",
)
def test_a_cache_of_diffusers_is_refused(plan: Plan) -> None:
    pipeline = attentive_pipeline()
    cached(pipeline.transformer)
    with pytest.raises(ConfigError, match=r"a cache of its own[\s\S]*disable_cache"):
        ditfastattn.accelerate(pipeline, plan, lowering="eager")


def test_whole_steps_are_not_calibrated_over_a_cache() -> None:
    pipeline = attentive_pipeline()
    cached(pipeline.transformer)
    target = Target.min_speedup(1.5)
    with pytest.raises(ConfigError, match=r"a cache of its own[\s\S]*disable_cache"):
        ditfastattn.calibrate(pipeline, CALL, target=target, method="whole-steps")


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
def test_whole_steps_are_calibrated_with_hooks_of_parts(parts: str) -> None:
    pipeline = attentive_pipeline()
    PARTS[parts](pipeline.transformer)
    dense = run(pipeline)
    target = Target.min_speedup(1.5)
    plan = ditfastattn.calibrate(pipeline, CALL, target=target, method="whole-steps")
    ditfastattn.accelerate(pipeline, plan)
    assert not torch.equal(run(pipeline), dense)
    ditfastattn.restore(pipeline)
    assert torch.equal(run(pipeline), dense)


def test_a_cache_that_comes_later_is_refused_until_it_is_gone(plan: Plan) -> None:
    pipeline = attentive_pipeline()
    dense = run(pipeline)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    expected = run(pipeline)
    cached(pipeline.transformer)
    with pytest.raises(ConfigError, match=r"a cache of its own[\s\S]*disable_cache"):
        run(pipeline)
    registry = HookRegistry.check_if_exists_or_initialize(pipeline.transformer)
    registry.remove_hook("pyramid_attention_broadcast", recurse=True)
    assert torch.equal(run(pipeline), expected)
    ditfastattn.restore(pipeline)
    assert torch.equal(run(pipeline), dense)


@works_with(
    "Hooks and offloading",
    "`enable_cache` of diffusers",
    "refused",
    "`disable_cache` first: a plan takes its place",
)
def test_enabling_a_cache_is_refused() -> None:
    make, given = TINY_PIPELINES["flux"]
    pipeline, call = make(), {"num_inference_steps": len(STRATEGIES), **given}
    plan = plan_for(pipeline, call, STRATEGIES)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    expected = generate(pipeline, Prompt(call, 3))
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ConfigError, match=r"a cache of its own[\s\S]*FirstBlockCacheConfig"):
        generate(pipeline, Prompt(call, 3))
    pipeline.transformer.disable_cache()
    assert torch.equal(generate(pipeline, Prompt(call, 3)), expected)
