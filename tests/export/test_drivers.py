"""A program that has nothing of ours, nor torch, generates with a bundle as our runtime does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]  # it has no annotations
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from safetensors.torch import load_file

from ditfastattn import Strategy, export, verify
from ditfastattn.runtime.bundle.golden import GOLDEN_FILE
from tests.cpp import built
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for
from tests.tiers import slow_but
from tests.tiny_pipelines import TINY_PIPELINES

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = [
    Strategy.FULL,
    Strategy.WINDOW_SHARE_CFG,
    Strategy.FULL,
    Strategy.EXTRAPOLATE,
    Strategy.EXTRAPOLATE_QUADRATIC,
    Strategy.SHARE_STEP,
]
DIGITS: dict[str, Any] = {"class_labels": [1], "guidance_scale": 2.0}
CASES: dict[str, Any] = {
    "caches renamed": lambda: (tiny_digits_pipeline(DPMSolverMultistepScheduler()), DIGITS),
    "clipped": lambda: (tiny_digits_pipeline(DDIMScheduler(clip_sample=True)), DIGITS),
    "learned variance": lambda: _tiny("dit"),
    "hoisted": lambda: _tiny("pixart"),
    "joint": lambda: _tiny("sd3"),
    "no guidance": lambda: _tiny("flux"),
}
MODULES = ("numpy", "onnxruntime")


def _tiny(name: str) -> tuple[Any, dict[str, Any]]:
    build, call = TINY_PIPELINES[name]
    return build(), call


def fresh_folder(folder: Path) -> Path:
    """Return a folder with the modules that the driver needs, and no others."""
    modules = folder / "modules"
    modules.mkdir()
    for name in MODULES:
        package = Path(sys.modules[name].__file__ or "").parent
        (modules / name).symlink_to(package)
        beside = package.with_name(f"{name}.libs")
        if beside.exists():
            (modules / beside.name).symlink_to(beside)
    return modules


@pytest.mark.parametrize("case", slow_but(["caches renamed", "hoisted"], CASES))
def test_the_python_driver_generates_what_we_do(case: str, tmp_path: Path) -> None:
    assert onnxruntime.__version__
    assert len((EXAMPLES / "run_bundle.py").read_text().splitlines()) < 60
    pipeline, call = CASES[case]()
    call = {**call, "num_inference_steps": len(STEPS)}
    plan = plan_for(pipeline, call, STEPS)
    torch._dynamo.reset()
    bundle = tmp_path / "bundle"
    export(pipeline, call, plan, bundle, dynamic_batch=case != "no guidance")
    assert verify(bundle).passed
    shutil.copy(EXAMPLES / "run_bundle.py", tmp_path)
    # -S leaves out what is installed, -I what the environment adds.
    start = "import sys, runpy; sys.path = [p for p in sys.path if p] + [sys.argv.pop(1)]; "
    start += "sys.argv.pop(0); runpy.run_path('run_bundle.py', run_name='__main__'); "
    start += "assert 'torch' not in sys.modules and 'ditfastattn' not in sys.modules"
    command = [sys.executable, "-I", "-S", "-c", start, str(fresh_folder(tmp_path))]
    done = subprocess.run(
        [*command, "run_bundle.py", "bundle", "out.npy"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    latents = load_file(bundle / GOLDEN_FILE)["latents"].numpy()
    error = np.abs(np.load(tmp_path / "out.npy") - latents).max()
    assert error < 1e-5 * np.abs(latents).max()


def settings_for(runtime: str, folder: Path) -> list[str]:
    """Return what CMake needs to build with ``runtime``, of the library that comes with Python."""
    if runtime == "openvino":
        openvino = pytest.importorskip("openvino.utils")
        return [f"-DOpenVINO_DIR={openvino.get_cmake_path()}"]
    headers = Path(os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime"))
    if not (headers / "onnxruntime_cxx_api.h").is_file():
        pytest.skip("no headers of onnxruntime: install libonnxruntime-dev, or name their folder")
    library = next((Path(str(onnxruntime.__file__)).parent / "capi").glob("libonnxruntime.so.*"))
    named = folder / "libonnxruntime.so.1"
    named.symlink_to(library)
    return [f"-DONNXRUNTIME_INCLUDE={headers}", f"-DONNXRUNTIME_LIBRARY={named}"]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_the_cpp_driver_generates_what_we_do(runtime: str, tmp_path: Path) -> None:
    settings = settings_for(runtime, tmp_path)
    built(EXAMPLES / "cpp-onnx", tmp_path, f"-DRUNTIME={runtime}", *settings)
    for case in ("caches renamed", "clipped", "learned variance", "hoisted"):
        pipeline, call = CASES[case]()
        call = {**call, "num_inference_steps": len(STEPS)}
        bundle, out = tmp_path / case.replace(" ", "-"), tmp_path / "out.f32"
        export(pipeline, call, plan_for(pipeline, call, STEPS), bundle)
        command = [str(tmp_path / "build" / "run_bundle"), str(bundle), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        latents = load_file(bundle / GOLDEN_FILE)["latents"].numpy()
        error = np.abs(np.fromfile(out, np.float32) - latents.ravel()).max()
        assert error < 5e-5 * np.abs(latents).max(), case
