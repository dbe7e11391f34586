"""The parts of the report, the most valuable first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ditfastattn
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.bundle.manifest import read_manifest
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.tools import benchmark_attention
from ditfastattn.tools.bench.random_models import ARCHITECTURES, random_pipeline
from ditfastattn.tools.gpu_report.fixed_plans import FIXED, fixed_plan
from ditfastattn.tools.gpu_report.models import measure_model

Keep = Callable[[str, Any], None]
_STEPS = 20


@dataclass(frozen=True)
class Setting:
    """Where the report runs, and whether it only tries the script."""

    device: str
    tiny: bool

    @property
    def steps(self) -> int:
        """Return the sampler's steps."""
        return 4 if self.tiny else _STEPS

    @property
    def lowering(self) -> Lowering:
        """Return what compiles models: nothing, to try the script without a GPU."""
        return Lowering.EAGER if self.tiny and self.device == "cpu" else Lowering.INDUCTOR


@dataclass(frozen=True)
class Part:
    """What a part measures, how many seconds it may take, and how it does so.

    ``measure`` takes the setting, the report's folder, and what keeps a finding.
    """

    summary: str
    seconds: float
    measure: Callable[[Setting, Path, Keep], None]


def _attention(setting: Setting, out: Path, keep: Keep) -> None:
    lengths, heads, head_dim = ((256,), 2, 16) if setting.tiny else ((1024, 4096, 16384), 16, 72)
    dtype = "bfloat16" if setting.device == "cuda" else "float32"
    for tokens in lengths:
        benchmark_attention.run(tokens, heads, head_dim, dtype, 10, out / "attention")
        keep(str(tokens), f"attention/{setting.device}-{tokens}-{dtype}.json")


def _models(*names: str) -> Callable[[Setting, Path, Keep], None]:
    def measure(setting: Setting, _: Path, keep: Keep) -> None:
        for name in ("dit-tiny",) if setting.tiny else names:
            model, device, compiled = ARCHITECTURES[name](), setting.device, setting.lowering
            measure_model(model, setting.steps, device, compiled, name, keep)

    return measure


def _bundle(setting: Setting, out: Path, **options: Any) -> tuple[Any, dict[str, Any], Path]:
    """Export a small model by a fixed plan; return its pipeline, its call, and the bundle."""
    pipeline = random_pipeline(ARCHITECTURES["dit-tiny"]())
    call = {"image": [0], "num_inference_steps": setting.steps}
    plan: Plan = fixed_plan(pipeline, call, FIXED["alternate"])
    folder = out / ("packages" if options.get("format") == "pt2" else "bundle")
    ditfastattn.export(pipeline, call, plan, folder, **options)
    return pipeline, call, folder


def _engines(setting: Setting, out: Path, keep: Keep) -> None:
    pipeline, call, folder = _bundle(setting, out, dtype="float16")
    target = "current" if setting.device == "cuda" else "sm89"
    engines = ditfastattn.build(folder, target=target)
    keep("engines", engines.model_dump(mode="json"))
    if setting.device == "cuda":
        found = ditfastattn.verify(folder, pipeline, call, runtime="tensorrt")
        keep("passed", found.passed)
        keep("errors", list(found.variant_errors))
    else:
        keep("not run", "engines are for a GPU")


def _packages(setting: Setting, out: Path, keep: Keep) -> None:
    pipeline, call, folder = _bundle(setting, out, format="pt2")
    keep("files", sorted(read_manifest(folder).files))
    found = ditfastattn.verify(folder, pipeline, call, runtime="aoti")
    keep("passed", found.passed)
    keep("errors", list(found.variant_errors))


def _memory(setting: Setting, _: Path, keep: Keep) -> None:
    if setting.device != "cuda":
        keep("not measured", "the allocator's peak is CUDA's")
        return
    name = "dit-tiny" if setting.tiny else "dit-xl-512"
    pipeline = random_pipeline(ARCHITECTURES[name]())
    call: dict[str, Any] = {"image": [0], "num_inference_steps": setting.steps}
    for pattern, does in FIXED.items():
        plan = fixed_plan(pipeline, call, does)
        peaks = []
        ways: tuple[dict[str, Any], ...] = {"dense": True}, {"plan": plan}
        for options in ways:
            ditfastattn.accelerate(pipeline, **options)
            pipeline(**call)
            torch.cuda.reset_peak_memory_stats()
            pipeline(**call)
            peaks.append(torch.cuda.max_memory_allocated())
            ditfastattn.restore(pipeline)
        dense, planned = peaks
        predicted = plan.calibration.cache_bytes
        keep(pattern, {"dense": dense, "planned": planned, "predicted caches": predicted})


PARTS = {
    "attention": Part(
        "an attention layer under each strategy, beside full attention", 150.0, _attention
    ),
    "dit-xl-512": Part(
        "DiT-XL/2 at 512: dense, planned, and planned with CUDA graphs",
        180.0,
        _models("dit-xl-512"),
    ),
    "memory": Part("the peak memory of caches, beside the prediction", 90.0, _memory),
    "engines": Part("TensorRT engines of a bundle, built, run and verified", 120.0, _engines),
    "packages": Part("AOTInductor packages of a bundle, run and verified", 90.0, _packages),
    "pixart-2k": Part(
        "PixArt-Sigma at 2K: dense, planned, and planned with CUDA graphs",
        240.0,
        _models("pixart-sigma-2k"),
    ),
}
