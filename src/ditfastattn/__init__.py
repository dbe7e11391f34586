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
from ditfastattn.exporting import build, export, export_triton, update_weights, verify
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.accelerate import accelerate, dense_generations, restore
from ditfastattn.runtime.book.book import Book, book
from ditfastattn.runtime.book.manifest import Figures
from ditfastattn.runtime.book.validate import measure_plan, validate_book
from ditfastattn.runtime.current_generation import generation
from ditfastattn.runtime.load import load
from ditfastattn.runtime.pipeline.experts import second_transformer
from ditfastattn.runtime.pipeline.sampler import check_sampler
from ditfastattn.runtime.quality import quality
from ditfastattn.runtime.search.calibrate import calibrate
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.judge.validate import Validation, validate
from ditfastattn.runtime.search.retarget import retarget
from ditfastattn.runtime.specializations import reports, reset

__all__ = [
    "Book",
    "CfgLayout",
    "ConfigError",
    "EngineError",
    "Figures",
    "Plan",
    "Strategy",
    "Target",
    "TargetMissedError",
    "Validation",
    "VerifyError",
    "__version__",
    "accelerate",
    "book",
    "build",
    "calibrate",
    "check_sampler",
    "dense_generations",
    "export",
    "export_triton",
    "generation",
    "load",
    "measure_plan",
    "quality",
    "reports",
    "reset",
    "restore",
    "retarget",
    "second_transformer",
    "update_weights",
    "validate",
    "validate_book",
    "verify",
]
