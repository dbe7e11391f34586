"""Describe the model's whole output as a site: where it is reused, a step runs nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from ditfastattn.passes.analysis.latent import latent_candidates
from ditfastattn.passes.analysis.site import GUIDANCE_COMPARES, Site, SiteKind
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import outputs, value

OUTPUT = "output"


def output_site(captured: CapturedGraph, latent: str = "") -> Site:
    """Return the site of what ``captured`` returns; ``latent`` names what is denoised, if known.

    Raises:
        ValueError: it returns something that is not computed from the call, or no single tensor.
    """
    found = outputs(captured.module.graph)
    node = found[0] if len(found) == 1 else None
    if not isinstance(node, Node) or node.op != "call_function":
        raise ValueError(f"the model returns {len(found)} results, not one that it computes")
    tensor = value(node)
    likely = [captured.inputs[index].name for index in latent_candidates(captured)]
    latents = [name for name in likely if latent in (name, "")]
    width, tokens = sizes(tensor.shape)
    return Site(
        name=OUTPUT,
        ordinal=-1,
        node=node.name,
        exits=(node.name,),
        kind=SiteKind.OUTPUT,
        tokens=tokens,
        heads=1,
        head_dim=width,
        grid=(),
        window=0,
        no_window="a window is defined for attention, this is the whole output",
        no_shared_guidance=GUIDANCE_COMPARES,
        no_fit=_why_no_fit(tensor, latents, likely),
        latent=latents[0] if len(latents) == 1 else "",
        latent_node=captured.node(latents[0]).name if len(latents) == 1 else "",
    )


def sizes(shape: torch.Size) -> tuple[int, int]:
    """Return the channels of an output ``[B, C, ...]`` or ``[B, N, C]``, and all other elements."""
    channels = shape[-1] if len(shape) == 3 else shape[1]
    return channels, math.prod(shape[1:]) // channels


def _why_no_fit(tensor: Tensor, latents: list[str], likely: list[str]) -> str:
    if not tensor.is_floating_point():
        return f"the output is of {tensor.dtype}"
    if len(latents) != 1:
        named = ", ".join(likely) or "none"
        return f"one input must be the latent, of the output's size; found {named}"
    return ""
