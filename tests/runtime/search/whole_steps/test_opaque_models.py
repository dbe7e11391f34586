"""Models whose inside cannot be captured: they run by whole steps all the same."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import ditfastattn
from ditfastattn import ConfigError, Plan, Target
from ditfastattn.runtime.pipeline.prompts import Prompt, generate, split_prompts
from ditfastattn.runtime.search.whole_steps.calibrate import Options, calibrate_whole_steps
from ditfastattn.tools.zoo import ZOO
from tests.tiny_pipelines import TINY_PIPELINES
from tests.works_with import works_with

STEPS = 6
SHARDED = Path(__file__).parent / "sharded.py"


class LoopPipeline:
    """Denoise with any model of the zoo: one call a step, without guidance."""

    def __init__(self, name: str) -> None:
        self.model = next(model for model in ZOO if model.name == name)
        self.transformer = self.model.build()
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler()

    def __call__(self, generator: torch.Generator, num_inference_steps: int) -> tuple[Tensor]:
        self.scheduler.set_timesteps(num_inference_steps)
        call = self.model.call(1, self.model.timesteps[0])
        latent = torch.randn(call["hidden_states"].shape, generator=generator)
        for timestep in self.scheduler.timesteps:
            given = call | {"hidden_states": latent, "return_dict": False}
            given[self.model.argument] = timestep.expand(1) / 1000
            output = self.transformer(**given)[0]
            latent = self.scheduler.step(output, timestep, latent, return_dict=False)[0]
        return (latent,)


@works_with(
    "Models",
    "classes that Dynamo cannot capture (Lumina 2, Mochi): whole-step plans",
    "works",
    "traced, or called as they are",
)
@pytest.mark.parametrize("name", ["Lumina2Transformer2DModel", "MochiTransformer3DModel"])
def test_a_class_that_breaks_dynamo_runs_by_whole_steps(name: str) -> None:
    torch._dynamo.reset()
    pipeline, call = LoopPipeline(name), {"num_inference_steps": STEPS}
    plan = opaque_plan(pipeline, call)
    assert plan.model.structure.startswith("module:")
    runs: list[int] = []
    dense = generate(pipeline, Prompt(call, 9))
    own = pipeline.transformer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return own(*args, **kwargs)

    pipeline.transformer.forward = counted
    ditfastattn.accelerate(pipeline, plan)
    planned = generate(pipeline, Prompt(call, 9))
    assert len(runs) == STEPS / 2
    assert torch.isfinite(planned).all()
    assert not torch.equal(planned, dense)
    ditfastattn.restore(pipeline)
    assert torch.equal(generate(pipeline, Prompt(call, 9)), dense)


def test_a_class_that_breaks_dynamo_is_calibrated_on_its_trace(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch._dynamo.reset()
    pipeline = LoopPipeline("OmniGenTransformer2DModel")
    call = {"num_inference_steps": 3}
    dense = generate(pipeline, Prompt(call, 9))
    with caplog.at_level(logging.WARNING, "ditfastattn"):
        plan = ditfastattn.calibrate(pipeline, call, target=Target.threshold(0.5))
    assert "its calls are traced with their inputs" in caplog.text
    assert plan.changed > 0
    assert not plan.model.structure.startswith("module:")
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    planned = generate(pipeline, Prompt(call, 9))
    assert planned.isfinite().all()
    assert not torch.equal(planned, dense)
    assert torch.equal(generate(pipeline, Prompt(call, 9)), planned)
    ditfastattn.restore(pipeline)
    assert torch.equal(generate(pipeline, Prompt(call, 9)), dense)


def opaque_plan(pipeline: Any, call: dict[str, Any]) -> Plan:
    prompts, unseen = split_prompts(call, 0), split_prompts(call, 500)
    options = Options(Target.min_speedup(2.0), opaque=True)
    return calibrate_whole_steps(pipeline, prompts, unseen, options)


@works_with(
    "Torch",
    "`torch.compile(transformer)` beneath a whole-step plan of a model called as it is",
    "works",
    "what runs stays compiled",
)
def test_a_compiled_transformer_stays_compiled() -> None:
    torch._dynamo.reset()
    make, given = TINY_PIPELINES["pixart"]
    pipeline, call = make(), {"num_inference_steps": STEPS, **given}
    plan = opaque_plan(pipeline, call)
    graphs: list[nn.Module] = []

    def backend(graph: Any, _example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    ditfastattn.accelerate(pipeline, plan)
    images = generate(pipeline, Prompt(call, 9))
    ditfastattn.restore(pipeline)
    pipeline.transformer = torch.compile(pipeline.transformer, backend=backend)
    ditfastattn.accelerate(pipeline, plan)
    compiled = generate(pipeline, Prompt(call, 9))
    assert graphs
    assert float((compiled - images).abs().max()) < 1e-5


def test_an_offloaded_transformer_runs_beneath_its_hooks() -> None:
    from accelerate.hooks import (  # type: ignore[import-untyped]  # it has no annotations
        ModelHook,
        add_hook_to_module,
    )

    make, given = TINY_PIPELINES["pixart"]
    pipeline, call = make(), {"num_inference_steps": STEPS, **given}
    plan = opaque_plan(pipeline, call)
    ditfastattn.accelerate(pipeline, plan)
    images = generate(pipeline, Prompt(call, 9))
    ditfastattn.restore(pipeline)
    for part in pipeline.transformer.transformer_blocks:
        add_hook_to_module(part, ModelHook())  # as sequential offloading does, part by part
    ditfastattn.accelerate(pipeline, plan)
    assert torch.equal(generate(pipeline, Prompt(call, 9)), images)


def test_weights_that_come_part_by_part_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    """As enable_sequential_cpu_offload() does it: until a part runs, its weights are not there."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    make, given = TINY_PIPELINES["pixart"]
    pipeline, call = make(), {"num_inference_steps": STEPS, **given}
    plan = opaque_plan(pipeline, call)
    ditfastattn.accelerate(pipeline, plan)
    images = generate(pipeline, Prompt(call, 9))

    def offload(pipeline: Any) -> None:
        for part in pipeline.transformer.transformer_blocks:
            for module in part.modules():
                hook = AlignDevicesHook(execution_device="cpu", offload=True)
                if any(True for _ in module.parameters(recurse=False)):
                    add_hook_to_module(module, hook)

    offload(pipeline)  # after accelerate
    assert any(item.is_meta for item in pipeline.transformer.parameters())
    assert torch.equal(generate(pipeline, Prompt(call, 9)), images)
    with caplog.at_level(logging.WARNING, "ditfastattn"):
        ditfastattn.accelerate(pipeline, plan)  # and before
    assert "weights are not compared" in caplog.text
    assert torch.equal(generate(pipeline, Prompt(call, 9)), images)
    ditfastattn.restore(pipeline)
    with pytest.raises(ConfigError, match="calibrate first"):
        opaque_plan(pipeline, call)


def test_its_graph_is_not_run_by_such_a_plan() -> None:
    make, given = TINY_PIPELINES["pixart"]
    pipeline, call = make(), {"num_inference_steps": STEPS, **given}
    plan = opaque_plan(pipeline, call)
    options: dict[str, Any] = {"plan": plan, "lowering": "eager"}
    pipeline.transformer = torch.compile(
        pipeline.transformer, backend="ditfastattn", options=options
    )
    with pytest.raises(ConfigError, match="called as it is, not for its graph"):
        generate(pipeline, Prompt(call, 9))


@pytest.mark.slow
@works_with(
    "Models",
    "a transformer sharded by diffusers' context parallelism: whole-step plans",
    "works",
    "all ranks decide alike",
)
def test_a_transformer_sharded_over_two_processes_decides_alike(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SHARDED), str(rank), str(tmp_path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for images in found:
        assert float((images["sharded"] - images["alone"]).abs().max()) < 1e-4
    assert torch.equal(found[0]["sharded"], found[1]["sharded"])
