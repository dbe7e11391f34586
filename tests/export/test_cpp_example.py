"""The C++ example runs a generation by a bundle of packages, from a folder that holds no Python."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from ditfastattn import Strategy, export, load
from tests.cpp import built
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "cpp"
STEPS = [Strategy.FULL, Strategy.SHARE_CFG, Strategy.EXTRAPOLATE]


@pytest.mark.slow
def test_the_cpp_example_computes_what_the_loop_does(tmp_path: Path) -> None:
    """By packages of whole steps, and by packages of regions."""
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=True))
    noise = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(7))
    labels = torch.tensor([1, 2, 10, 10])
    inputs = {"noise": noise, "class_labels": labels}
    safetensors.torch.save_file(inputs, tmp_path / "inputs.safetensors")
    built(SOURCE, tmp_path, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    program = str(tmp_path / "build" / "generate")
    for name, steps in (("whole", STEPS), ("regions", [Strategy.FULL, Strategy.SHARE_STEP])):
        call: dict[str, Any] = {
            "class_labels": [1],
            "num_inference_steps": len(steps),
            "guidance_scale": 2.0,
        }
        plan, regions = plan_for(pipeline, call, steps), name == "regions"
        export(pipeline, call, plan, tmp_path / "onnx", loop=True)
        expected = load(tmp_path / "onnx").generate(noise, class_labels=labels)
        export(pipeline, call, plan, tmp_path / name, format="pt2", regions=regions)
        paths = [str(tmp_path / file) for file in (name, "inputs.safetensors", f"{name}.latents")]
        done = subprocess.run([program, *paths], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        got = safetensors.torch.load_file(tmp_path / f"{name}.latents")["latents"]
        assert float((got - expected).abs().max()) < 5e-5  # roundings, times 1 / sqrt(alpha)
        manifest = (tmp_path / name / "manifest.json").read_text()
        other = manifest.replace(f'"torch": "{torch.__version__}"', '"torch": "2.99.0"')
        (tmp_path / name / "manifest.json").write_text(other)
        done = subprocess.run([program, *paths], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "for torch 2.99.0" in done.stderr
