"""Identify the model that a plan of whole steps is for: captured, or opaque where it cannot be."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.fingerprint import Fingerprint, module_fingerprint
from ditfastattn.passes.analysis.output_site import OUTPUT, output_site, sizes
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.plan.planned_site import PlannedSite, planned_site
from ditfastattn.passes.plan.schema import Plan, Sampler
from ditfastattn.passes.plan.text import PaddedText
from ditfastattn.runtime.clock import read_timestep
from ditfastattn.runtime.matching import input_shapes
from ditfastattn.runtime.pipeline.denoiser import denoiser_name, transformer_of
from ditfastattn.runtime.pipeline.guidance import guidance_of
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.pipeline.sampler import describe_sampler
from ditfastattn.runtime.pipeline.text_padding import padded_text
from ditfastattn.runtime.search.measure.call_log import searched_phases
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.whole_steps.observed import Observed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """Describe what a plan of whole steps is for.

    Attributes:
        module: fingerprint of the model as a module.
        captured: its fingerprint, inputs and output where it is captured; None where it is opaque.
        guidance_scale: of the calibration.
        timestep: the name of the model's argument.
        text: to what the pipeline's text is padded.
        scheduler: the pipeline's.
    """

    module: Fingerprint
    captured: tuple[Fingerprint, dict[str, tuple[int, ...]], PlannedSite] | None
    guidance_scale: float | None
    timestep: str
    text: PaddedText | None
    scheduler: Any

    @property
    def identity(self) -> Fingerprint:
        """Return the fingerprint that the plan records."""
        return self.module if self.captured is None else self.captured[0]

    def site(self, observed: Observed) -> PlannedSite:
        """Return the whole output, as a plan records it."""
        if self.captured is not None:
            return self.captured[2].model_copy(update={"latent": observed.latent})
        width, tokens = sizes(observed.steps[0].calls[0].output.shape)
        return PlannedSite(
            name=OUTPUT,
            kind=SiteKind.OUTPUT,
            tokens=tokens,
            heads=1,
            head_dim=width,
            window=0,
            latent=observed.latent,
        )

    def inputs(self, observed: Observed) -> dict[str, tuple[int, ...]]:
        """Return the shapes that the plan is for: the latent's alone of an opaque model."""
        if self.captured is not None:
            return self.captured[1]
        return _latent_shape(observed)

    def sampler(self, observed: Observed) -> Sampler:
        """Describe the sampler of the observed generation."""
        named = [step.calls[0].arguments.get(self.timestep) for step in observed.steps]
        if named[0] is None:
            raise ConfigError(
                "the model has no argument for the timestep",
                where="calibrate(timestep)",
                got=self.timestep,
                expected=", ".join(observed.steps[0].calls[0].arguments),
            )
        values = [read_timestep(torch.as_tensor(item)).value() for item in named]
        return describe_sampler(
            self.scheduler, values, self.guidance_scale, observed.layout, observed.phases
        )

    def opaque(self, plan: Plan) -> Plan:
        """Return ``plan`` for the module as it is, to run it uncompiled."""
        inputs = {site.latent: plan.inputs[site.latent] for site in plan.sites}
        return plan.model_copy(update={"model": self.module, "inputs": inputs})


def _latent_shape(observed: Observed) -> dict[str, tuple[int, ...]]:
    latent: Tensor = observed.steps[0].calls[0].arguments[observed.latent]
    return {observed.latent: tuple(latent.shape[1:])}


def identify(
    pipeline: Any,
    prompt: Prompt,
    timestep: str,
    first: Observed,
    opaque: bool = False,
) -> Subject:
    """Return what ``pipeline`` generates ``prompt`` with; captured where that is possible.

    ``first`` is its dense generation. Where it has phases, the model is captured in the first one.
    """
    module = transformer_of(pipeline, "calibrate(pipeline)")
    scale = guidance_of(pipeline, prompt.call)
    captured, layout = None, first.layouts[0]
    only = searched_phases(first.spans)[0] if first.phases else None
    if not opaque and denoiser_name(pipeline) == "transformer":
        try:
            with open_session(pipeline, prompt, layout, timestep, only=only) as session:
                site = _fitted_site(session.captured, first.latent)
                captured = session.identity, input_shapes(session.captured), site
        except (ConfigError, ValueError, TorchDynamoException) as error:
            reason = str(error).splitlines()[0]
            log.warning("ditfastattn: the model is not captured, and called as it is: %s", reason)
    identity, text = module_fingerprint(module), padded_text(module)
    return Subject(identity, captured, scale, timestep, text, pipeline.scheduler)


def _fitted_site(captured: CapturedGraph, latent: str) -> PlannedSite:
    """Return the whole output as a plan records it; ``ValueError`` where it cannot be fitted."""
    site = output_site(captured, latent)
    if site.no_fit:
        raise ValueError(site.no_fit)
    return planned_site(site)
