"""Generations of three steps, of which a plan skips the last two."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditfastattn import Strategy
from ditfastattn.runtime.pipeline.prompts import Prompt, generate

CALL: dict[str, Any] = {"class_labels": [1], "num_inference_steps": 3}
STRATEGIES = [Strategy.FULL, Strategy.SHARE_STEP, Strategy.SHARE_STEP]


def run(pipeline: Any, **changes: Any) -> Tensor:
    """Return the images of ``CALL`` with ``changes``."""
    images: Tensor = generate(pipeline, Prompt(CALL | changes, 3))
    return images
