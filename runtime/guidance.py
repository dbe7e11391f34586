"""Find out how a pipeline batches guidance, by looking at what it gives its transformer."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditfastattn.passes.plan import CfgLayout

log = logging.getLogger(__name__)


def detect_cfg_layout(pipeline: Any, call: Mapping[str, Any]) -> CfgLayout:
    """Run one step without guidance and one with it, and compare the transformer's inputs.

    Without guidance (scale 1) only the conditional lane runs. The half of the guided batch that
    holds the same conditions is the conditional one; where no half does, there is no layout.

    Args:
        pipeline: a diffusers pipeline with a ``transformer`` and a ``guidance_scale`` argument.
        call: the keyword arguments of a generation.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    if "guidance_scale" not in parameters:
        log.info("guidance: the pipeline has no guidance_scale: share-cfg is not considered")
        return CfgLayout.NONE
    guided = _observe(pipeline, {**call})
    plain = _observe(pipeline, {**call, "guidance_scale": 1.0})
    for name, conditions in plain.items():
        layout = _compare(conditions, guided.get(name))
        if layout is not CfgLayout.NONE:
            log.info("guidance: batched, %s (seen at the argument %s)", layout, name)
            return layout
    log.info("guidance: not batched in one call: share-cfg is not considered")
    return CfgLayout.NONE


def _compare(conditions: Tensor, guided: Tensor | None) -> CfgLayout:
    lanes = len(conditions)
    if guided is None or len(guided) != 2 * lanes or conditions.shape[1:] != guided.shape[1:]:
        return CfgLayout.NONE
    first, second = (torch.equal(half, conditions) for half in torch.split(guided, lanes))
    if first == second:  # the same in both lanes, like the latents: says nothing
        return CfgLayout.NONE
    return CfgLayout.COND_FIRST if first else CfgLayout.UNCOND_FIRST


def _observe(pipeline: Any, call: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the first call of the transformer in a one-step generation."""
    seen: dict[str, Tensor] = {}
    names = list(inspect.signature(pipeline.transformer.forward).parameters)

    def look(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(names, args, strict=False)) | kwargs
        for name, item in named.items():
            if isinstance(item, Tensor) and item.dim() > 0:
                seen.setdefault(name, item.detach().clone())

    handle = pipeline.transformer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        generator = torch.Generator().manual_seed(0)
        pipeline(**{**call, "num_inference_steps": 1, "generator": generator})
    finally:
        handle.remove()
    return seen
