"""Make trained diffusion transformers fast, without retraining.

The main names::

    plan = ditfastattn.calibrate(
        pipeline,
        {"class_labels": [1, 7], "num_inference_steps": 20},
        target=ditfastattn.Target.min_ssim(0.95),
        out="plan.json",
    )
    ditfastattn.accelerate(pipeline, "plan.json")  # or torch.compile(backend="ditfastattn")
    ditfastattn.export(pipeline, {"class_labels": [1]}, "plan.json", "bundle")
    pipeline.transformer = ditfastattn.load("bundle")
"""

from __future__ import annotations

import ditfastattn.export  # noqa: F401  # before the function of that name, which replaces it
from ditfastattn.core.errors import ConfigError, EngineError, TargetMissedError, VerifyError
from ditfastattn.core.version import __version__
from ditfastattn.exporting import build, export, update_weights, verify
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.accelerate import accelerate, dense_generations, restore
from ditfastattn.runtime.current_generation import generation
from ditfastattn.runtime.load import load
from ditfastattn.runtime.pipeline.sampler import check_sampler
from ditfastattn.runtime.search.calibrate import calibrate
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.judge.validate import Validation, validate
from ditfastattn.runtime.search.retarget import retarget
from ditfastattn.runtime.specializations import reports, reset

__all__ = [
    "CfgLayout",
    "ConfigError",
    "EngineError",
    "Plan",
    "Strategy",
    "Target",
    "TargetMissedError",
    "Validation",
    "VerifyError",
    "__version__",
    "accelerate",
    "build",
    "calibrate",
    "check_sampler",
    "dense_generations",
    "export",
    "generation",
    "load",
    "reports",
    "reset",
    "restore",
    "retarget",
    "update_weights",
    "validate",
    "verify",
]
