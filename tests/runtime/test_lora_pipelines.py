"""LoRA adapters as users load them: from a file, into a pipeline that a plan runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

import ditfastattn
from ditfastattn import ConfigError, Plan
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.exercises import exercises
from tests.plans import mixed_plan_for
from tests.tiny_pipelines import TINY_PIPELINES
from tests.works_with import works_with

CALL: dict[str, Any] = {"num_inference_steps": 4, **TINY_PIPELINES["sd3"][1]}
SEED = 5
UNKNOWN = r"plan\.model\.lora: the model has LoRA adapters that the plan was not calibrated with"
ABSENT = r"plan\.model\.lora: the plan was calibrated with LoRA adapters; the model has none"
FUSED = r"plan\.model\.weights[\s\S]*fusing LoRA adapters changes the weights"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pipeline, and the file of an adapter for it."""
    made = tmp_path_factory.mktemp("lora")
    build, _ = TINY_PIPELINES["sd3"]
    pipeline = build()
    pipeline.save_pretrained(made / "base")
    for seed, (name, alpha) in enumerate({"style": 8, "subject": 8, "faint": 4}.items(), start=1):
        torch.manual_seed(seed)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        config = LoraConfig(
            r=4,
            lora_alpha=alpha,
            init_lora_weights=False,  # lora_B gets weights: zeros would change nothing
            target_modules=targets,
        )
        pipeline.transformer.add_adapter(config, adapter_name=name)
        layers = get_peft_model_state_dict(pipeline.transformer, adapter_name=name)
        metadata = {"r": 4, "lora_alpha": alpha, "target_modules": targets}
        pipeline.save_lora_weights(
            made / name,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=metadata,
        )
    return made


@pytest.fixture
def pipeline(folder: Path) -> Any:
    torch._dynamo.reset()
    return loaded(folder / "base")


def loaded(path: Path) -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any) -> Tensor:
    images: Tensor = generate(pipeline, Prompt(CALL, SEED))
    return images


def accelerated(pipeline: Any, plan: Plan) -> Any:
    return ditfastattn.accelerate(pipeline, plan, lowering="eager")


@exercises("LoRA", "sd3")
@pytest.mark.slow
@works_with(
    "Weights",
    "`load_lora_weights`, then `calibrate` and `accelerate`",
    "works",
)
def test_a_plan_is_of_the_adapter_that_was_loaded(pipeline: Any, folder: Path) -> None:
    base, dense = mixed_plan_for(pipeline, CALL), run(pipeline)
    expected = run(accelerated(pipeline, base.plan))
    pipeline.load_lora_weights(folder / "style", adapter_name="style")
    with pytest.raises(ConfigError, match=UNKNOWN):
        run(pipeline)
    ditfastattn.restore(pipeline)
    assert not torch.equal(run(pipeline), dense)
    styled = mixed_plan_for(pipeline, CALL, seed=1)
    interpreted = styled.interpret(pipeline, Prompt(CALL, SEED))
    assert float((run(accelerated(pipeline, styled.plan)) - interpreted).abs().max()) < 1e-4
    pipeline.unload_lora_weights()
    with pytest.raises(ConfigError, match=ABSENT):
        run(pipeline)
    assert torch.equal(run(accelerated(pipeline, base.plan)), expected)


@pytest.mark.slow
def test_a_fused_adapter_is_saved_and_has_a_plan_of_its_own(
    pipeline: Any, folder: Path, tmp_path: Path
) -> None:
    base = mixed_plan_for(pipeline, CALL).plan
    pipeline.load_lora_weights(folder / "style")
    with_adapter = mixed_plan_for(pipeline, CALL).plan
    loose = run(pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert torch.allclose(run(pipeline), loose, atol=1e-4)
    for other, message in ((base, FUSED), (with_adapter, ABSENT)):
        with pytest.raises(ConfigError, match=message):
            run(accelerated(pipeline, other))
    ditfastattn.restore(pipeline)
    plan = mixed_plan_for(pipeline, CALL).plan
    expected = run(accelerated(pipeline, plan))
    pipeline.save_pretrained(tmp_path / "styled")  # while it runs by a plan
    again = loaded(tmp_path / "styled")
    assert torch.equal(run(accelerated(again, plan)), expected)
    assert not hasattr(again.transformer, "peft_config")


@pytest.mark.slow
@works_with(
    "Weights",
    "LoRA: `set_adapters` with another scale",
    "works",
    "with a warning",
)
def test_another_scale_of_a_loaded_adapter_is_warned_of(
    pipeline: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.load_lora_weights(folder / "style", adapter_name="style")
    plan = mixed_plan_for(pipeline, CALL).plan
    expected = run(accelerated(pipeline, plan))
    pipeline.set_adapters("style", 0.5)
    assert not torch.equal(run(pipeline), expected)
    assert "or their scale, differ" in caplog.text
    pipeline.set_adapters("style", 1.0)
    assert torch.equal(run(pipeline), expected)


@works_with(
    "Weights",
    "LoRA: `load_lora_weights(..., hotswap=True)`",
    "works",
    "nothing is compiled again; other adapters than the plan's are warned of",
)
@pytest.mark.parametrize("other", ["subject", "faint"])
def test_adapters_are_hot_swapped_without_compiling_again(
    other: str, pipeline: Any, folder: Path
) -> None:
    if other == "faint":  # its scale is another one: PEFT then wants all of them as tensors
        pipeline.transformer.enable_lora_hotswap(target_rank=4)
    pipeline.load_lora_weights(folder / "style", adapter_name="served")
    mixed = mixed_plan_for(pipeline, CALL)
    images = [run(accelerated(pipeline, mixed.plan))]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name in (other, "style"):
        pipeline.load_lora_weights(folder / name, adapter_name="served", hotswap=True)
        images.append(run(pipeline))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        interpreted = mixed.interpret(pipeline, Prompt(CALL, SEED))
        assert float((images[-1] - interpreted).abs().max()) < 1e-4
    assert torch.equal(images[2], images[0])
    assert float((images[1] - images[0]).abs().max()) > 1e-3
