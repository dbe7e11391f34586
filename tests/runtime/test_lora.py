"""A plan names LoRA adapters where they are what differs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from ditfastattn import ConfigError, Plan, Strategy
from ditfastattn.runtime import matching
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    captured_once,
    largest_difference,
    make_plan,
    mixed_strategies,
    tiny_dit,
    tiny_sd3,
)
from tests.tiers import slow_but
from tests.works_with import works_with

UNKNOWN = r"plan.model.lora: the model has LoRA adapters that the plan was not calibrated with"
ABSENT = r"plan.model.lora: the plan was calibrated with LoRA adapters; the model has none"
OTHER = "the model's LoRA adapters, or their scale, differ from those that the plan was calibrated"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    matching._warn_of_other_adapters.cache_clear()


def config(alpha: int = 8) -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=alpha,
        init_lora_weights=False,  # lora_B gets weights: zeros would change nothing
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
    )


def with_lora(tiny: TinyModel, alpha: int = 8, seed: int = 0) -> TinyModel:
    """Return a copy of ``tiny`` with an adapter of scale alpha / 4."""
    torch.manual_seed(seed)
    model = inject_adapter_in_model(config(alpha), copy.deepcopy(tiny.model))
    return TinyModel(model.eval(), tiny.call)


def sd3_with_lora() -> TinyModel:
    """Return an SD3 with an adapter as diffusers adds and manages it."""
    tiny = tiny_sd3(layers=2)
    model: Any = copy.deepcopy(tiny.model)
    torch.manual_seed(0)
    model.add_adapter(config(), adapter_name="style")
    return TinyModel(model.eval(), tiny.call)


def plan_for(tiny: TinyModel) -> Plan:
    plan = make_plan(tiny, mixed_strategies(captured_once(tiny).sites, seed=1))
    torch._dynamo.reset()
    return plan


def planned(model: torch.nn.Module, plan: Plan) -> Any:
    options: dict[str, Any] = {"plan": plan, "lowering": "eager"}
    return torch.compile(model, backend="ditfastattn", fullgraph=True, options=options)


def assert_runs(tiny: TinyModel, plan: Plan, compiled: Any = None) -> None:
    expected = tiny.reference(plan.strategies, captured_once(tiny).sites, plan.sampler.cfg_layout)
    got = tiny.run(planned(tiny.model, plan) if compiled is None else compiled)
    assert largest_difference(got, expected) < 1e-5


def graphs() -> int:
    """Return how many graphs Dynamo has captured."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_refused(tiny: TinyModel, plan: Plan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.run(planned(tiny.model, plan), steps=1)


@pytest.mark.parametrize("name", slow_but({"dit"}, TINY_MODELS))
def test_a_plan_belongs_to_the_model_with_or_without_adapters(name: str) -> None:
    base, adapted = TINY_MODELS[name](), with_lora(TINY_MODELS[name]())
    without, with_adapters = plan_for(base), plan_for(adapted)
    assert with_adapters.sites == without.sites
    assert without.model == with_adapters.model.model_copy(update={"lora": ""})
    assert largest_difference(adapted.run(adapted.model), base.run(base.model)) > 1e-3
    assert_runs(adapted, with_adapters)
    assert_refused(adapted, without, UNKNOWN + r"[\s\S]*got: +\w{32}[\s\S]*remedy: +unload")
    assert_refused(base, with_adapters, ABSENT + r"[\s\S]*got: +no adapters[\s\S]*remedy: +load")


@works_with(
    "Weights",
    "other LoRA adapters, or another scale, than the plan's",
    "works",
    "with a warning",
)
@pytest.mark.parametrize(
    "other",
    # a scale of 1, alpha 4, leaves no constant
    slow_but([{"alpha": 2}, {"seed": 1}], [{"alpha": 4}, {"alpha": 2}, {"seed": 1}]),
    ids=str,
)
def test_another_scale_and_other_adapters_run_with_a_warning(
    other: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    own = with_lora(tiny_dit(layers=1))
    plan = plan_for(own)
    assert_runs(own, plan)
    assert OTHER not in caplog.text
    assert_runs(with_lora(tiny_dit(layers=1), **other), plan)
    assert caplog.text.count(OTHER) == 1


@pytest.mark.slow
def test_a_scale_set_on_a_compiled_model_counts_from_the_next_generation_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapted = sd3_with_lora()
    model: Any = adapted.model
    plan = plan_for(adapted)
    compiled = planned(model, plan)
    for scale in (0.5, 0.25, 1.0):  # after the first value, Dynamo passes the scale as a tensor
        model.set_adapters("style", scale)
        assert_runs(adapted, plan, compiled)
    assert caplog.text.count(OTHER) == 2


@works_with(
    "Weights",
    "LoRA adapters of equal rank swapped by PEFT",
    "works",
    "without compiling again",
)
def test_adapters_of_equal_rank_are_swapped_without_compiling_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapted = sd3_with_lora()
    model: Any = adapted.model
    plan = plan_for(adapted)
    torch.manual_seed(1)
    model.add_adapter(config(), adapter_name="subject")
    model.set_adapter("style")
    compiled = planned(model, plan)
    before = graphs()
    outputs = {}
    for _ in range(3):
        for name in ("style", "subject"):
            model.set_adapter(name)
            assert_runs(adapted, plan, compiled)
            outputs[name] = adapted.run(compiled)
            assert graphs() - before == len(outputs)  # once, when an adapter is first active
    assert largest_difference(outputs["style"], outputs["subject"]) > 1e-3
    assert caplog.text.count(OTHER) == 1


@pytest.mark.slow
@works_with(
    "Weights",
    "adapters unloaded or disabled",
    "works",
)
def test_unloaded_or_disabled_adapters_leave_the_base_model_its_plan() -> None:
    plan = plan_for(tiny_sd3(layers=2))
    adapted = sd3_with_lora()
    model: Any = adapted.model
    assert_refused(adapted, plan, UNKNOWN)
    model.disable_adapters()
    assert_runs(adapted, plan)
    model.enable_adapters()
    assert_refused(adapted, plan, UNKNOWN)
    model.unload_lora()
    assert_runs(adapted, plan)


@works_with(
    "Weights",
    "`fuse_lora()`",
    "refused",
    "fused adapters are other weights",
)
@pytest.mark.slow  # test_lora_pipelines.py fuses a loaded adapter by default
def test_fused_adapters_are_other_weights() -> None:
    adapted = sd3_with_lora()
    plans = plan_for(tiny_sd3(layers=2)), plan_for(adapted)
    model: Any = adapted.model
    model.fuse_lora()
    remedy = r"plan.model.weights[\s\S]*remedy: .*fusing LoRA adapters changes the weights"
    assert_refused(adapted, plans[0], remedy)
    assert_refused(adapted, plans[1], ABSENT)


def test_adapters_of_another_dtype_are_no_other_dtype_of_the_model() -> None:
    tiny = tiny_dit(layers=1)
    halves = TinyModel(copy.deepcopy(tiny.model).to(torch.bfloat16), half(tiny.call))
    plan = plan_for(halves)
    adapted = with_lora(halves)
    for name, parameter in adapted.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert plan.model.dtype == "bfloat16"
    assert_refused(adapted, plan, UNKNOWN)


def half(call: Callable[[int, int], dict[str, Any]]) -> Callable[[int, int], dict[str, Any]]:
    def halved(step: int, batch: int) -> dict[str, Any]:
        given = call(step, batch)
        return given | {"hidden_states": given["hidden_states"].bfloat16()}

    return halved


def test_each_of_several_adapters_counts_with_its_own_scale() -> None:
    def build(first: float, second: float) -> TinyModel:
        adapted = sd3_with_lora()
        model: Any = adapted.model
        model.add_adapter(config(), adapter_name="subject")
        model.set_adapters(["style", "subject"], [first, second])
        return adapted

    plan = plan_for(build(1.0, 0.5))
    assert plan_for(build(1.0, 0.5)).model == plan.model
    assert plan_for(build(0.5, 1.0)).model.lora != plan.model.lora
    assert plan_for(sd3_with_lora()).model.lora != plan.model.lora


def test_a_wrapped_model_is_the_model_itself() -> None:
    tiny = tiny_dit(layers=1)
    plan = plan_for(with_lora(tiny))
    torch.manual_seed(0)
    wrapped: PeftModel = get_peft_model(copy.deepcopy(tiny.model), config())
    assert plan_for(TinyModel(wrapped.eval(), tiny.call)) == plan


def test_adapters_of_convolutions_and_embeddings_count_with_their_scale() -> None:
    def lora(alpha: int) -> str:
        torch.manual_seed(0)
        targets = LoraConfig(
            r=2,
            lora_alpha=alpha,
            init_lora_weights=False,
            target_modules=["proj", "embedding_table"],
        )
        model = inject_adapter_in_model(targets, copy.deepcopy(tiny_dit().model)).eval()
        adapted = TinyModel(model, tiny_dit().call)
        return make_plan(adapted, [(Strategy.FULL,) * 3] * 6).model.lora

    assert "" != lora(4) != lora(8)
