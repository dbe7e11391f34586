"""Make trained diffusion transformers fast, without retraining.

The main names::

    plan = ditfastattn.calibrate(pipeline, {"class_labels": [1, 7], "num_inference_steps": 20})
    plan.save("plan.json")
    pipeline.transformer = torch.compile(
        pipeline.transformer, backend="ditfastattn", options={"plan": "plan.json"}
    )
"""

from __future__ import annotations

from ditfastattn.errors import ConfigError, VerifyError
from ditfastattn.passes.plan import CfgLayout, Plan, Strategy
from ditfastattn.runtime.calibrate_pipeline import calibrate
from ditfastattn.runtime.matching import check_sampler
from ditfastattn.runtime.planned import reports, reset

__version__ = "0.1.0"

__all__ = [
    "CfgLayout",
    "ConfigError",
    "Plan",
    "Strategy",
    "VerifyError",
    "calibrate",
    "check_sampler",
    "reports",
    "reset",
]
