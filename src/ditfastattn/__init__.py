"""Make trained diffusion transformers fast, without retraining.

The main names::

    plan = ditfastattn.calibrate(
        pipeline,
        {"class_labels": [1, 7], "num_inference_steps": 20},
        target=ditfastattn.Target.min_ssim(0.95),
        out="plan.json",
    )
    pipeline.transformer = torch.compile(
        pipeline.transformer, backend="ditfastattn", options={"plan": "plan.json"}
    )
"""

from __future__ import annotations

from ditfastattn.errors import ConfigError, TargetMissedError, VerifyError
from ditfastattn.passes.plan import CfgLayout, Plan, Strategy
from ditfastattn.runtime.calibrate_pipeline import calibrate
from ditfastattn.runtime.matching import check_sampler
from ditfastattn.runtime.planned import reports, reset
from ditfastattn.runtime.search.retarget import retarget
from ditfastattn.runtime.search.targets import Target
from ditfastattn.runtime.search.validate import Validation, validate

__version__ = "0.1.0"

__all__ = [
    "CfgLayout",
    "ConfigError",
    "Plan",
    "Strategy",
    "Target",
    "TargetMissedError",
    "Validation",
    "VerifyError",
    "calibrate",
    "check_sampler",
    "reports",
    "reset",
    "retarget",
    "validate",
]
