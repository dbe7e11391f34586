"""Refuse a plan that is not for this model or sampler, naming the field, got and expected."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.sites import Site
from ditfastattn.passes.capture.dynamo import CapturedGraph
from ditfastattn.passes.graph.ir import value
from ditfastattn.passes.plan.schema import CfgLayout, Fingerprint, Plan, PlannedSite, TileWindow
from ditfastattn.passes.rewrites.split_heads import split_heads

log = logging.getLogger(__name__)

_RECALIBRATE = "calibrate a plan for this model and these inputs"


def input_shapes(captured: CapturedGraph) -> dict[str, tuple[int, ...]]:
    """Return the shape, without the batch, of each tensor of the model's call."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in captured.dynamic_names:
        shapes[name] = tuple(value(captured.node(name)).shape[1:])
    return dict(sorted(shapes.items()))


def check_shapes(
    captured: CapturedGraph,
    expected: Sequence[Tensor],
    tensors: Sequence[Tensor],
    problem: str,
    remedy: str,
) -> None:
    """Raise ``ConfigError`` unless ``tensors`` have the shapes and dtypes of ``expected``.

    Both are in the order of the inputs of ``captured``.
    """
    for entry, wanted, got in zip(captured.inputs, expected, tensors, strict=True):
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise ConfigError(
                problem,
                where=f"argument {entry.name!r}",
                got=f"{list(got.shape)} {got.dtype}",
                expected=f"{list(wanted.shape)} {wanted.dtype}",
                remedy=remedy,
            )


def timestep_position(captured: CapturedGraph, name: str) -> int:
    """Return which flat input is the timestep.

    Raises:
        ConfigError: the model has no tensor argument of that name.
    """
    for index, entry in enumerate(captured.inputs):
        if entry.name == name and not entry.static:
            return index
    raise ConfigError(
        "the model has no tensor argument for the timestep",
        where="torch.compile(options={'timestep': ...})",
        got=name,
        expected=" or ".join(captured.dynamic_names),
        remedy="name the argument, and pass the timestep as a tensor",
    )


def check_halves(first: Tensor, second: Tensor, where: str) -> None:
    """Raise ``ConfigError`` unless both halves of guidance hold the same latents.

    A plan that shares guidance copies one half over the other. Were the halves different images,
    generated without guidance, one would silently replace the other.
    """
    if first.shape != second.shape or not torch.equal(first, second):
        raise ConfigError(
            "the plan shares guidance, but its halves hold different latents",
            where=where,
            got=f"{len(first)} and {len(second)} different latents",
            expected="the same latents twice, for the conditional and the unconditional half",
            remedy="run with the plan's guidance, or calibrate a plan without guidance",
        )


def warn_of_unchecked_latents(inputs: Sequence[str]) -> None:
    """Warn that a plan shares guidance, and nothing can refuse halves of different images."""
    log.warning(
        "ditfastattn: the plan shares guidance, and none of the model's inputs (%s) has the size "
        "of its output, so the latent is unknown: run with the plan's guidance, since different "
        "images in its halves would go unnoticed",
        ", ".join(inputs),
    )


def split_as_planned(plan: Plan, captured: CapturedGraph, sites: Sequence[Site]) -> CapturedGraph:
    """Return ``captured`` with the heads of its ``sites`` split by the groups of ``plan``.

    What cannot be split is left whole, and logged; ``planned_sites`` then refuses the plan.
    """
    split = split_heads(captured, sites, plan.head_groups)
    for name, reason in split.declined.items():
        log.warning("ditfastattn: the plan splits the heads of %s, but %s", name, reason)
    return split.captured


def planned_sites(
    plan: Plan,
    captured: CapturedGraph,
    sites: Sequence[Site],
    fingerprint: Fingerprint,
) -> tuple[Site, ...]:
    """Return those of ``sites`` that ``plan`` speaks of, in its order.

    Raises:
        ConfigError: the plan is for another model, or for other shapes.
    """
    _check_inputs(plan, input_shapes(captured))
    wanted = {site.name for site in plan.sites}
    chosen = tuple(site for site in sites if site.name in wanted)
    recorded = [(site.name, site.kind, site.tokens) for site in plan.sites]
    found = [(site.name, site.kind, site.tokens) for site in chosen]
    if recorded != found:
        raise _mismatch("sites", _names(found), _names(recorded))
    check_fingerprint(fingerprint, plan.model)
    chosen = tuple(map(_as_planned, chosen, plan.sites))
    for row in plan.strategies:
        for site, strategy in zip(chosen, row, strict=True):
            reason = site.why_not(strategy, plan.sampler.cfg_layout)
            if reason:
                raise _mismatch(f"strategies ({site.name})", strategy, reason)
    return chosen


def _as_planned(site: Site, planned: PlannedSite) -> Site:
    """Give ``site`` window and caches of the plan; a grid must be of the site's tokens."""
    window, tokens = planned.window, site.tokens - sum(site.text)
    if isinstance(window, TileWindow) and window.tokens != tokens:
        grid = " x ".join(map(str, window.grid))
        raise _mismatch(f"sites ({site.name}): window", f"{tokens} tokens of the image", grid)
    return replace(site, window=window).with_caches_in(planned.cache_dtype)


def check_fingerprint(got: Fingerprint, expected: Fingerprint) -> None:
    """Raise ``ConfigError`` unless both are of the same model, dtype, weights and adapters."""
    if got.structure != expected.structure:
        raise _mismatch("model.structure", got.structure, expected.structure)
    if got.dtype != expected.dtype:
        raise _mismatch("model.dtype", got.dtype, expected.dtype)
    if got.lora != expected.lora:
        raise _other_lora(got.lora, expected.lora)
    if got.weights != expected.weights:
        remedy = f"{_RECALIBRATE}; LoRA adapters fused into the weights make new weights"
        raise _mismatch("model.weights", got.weights, expected.weights, remedy)


def _other_lora(got: str, expected: str) -> ConfigError:
    if not expected:
        what = "the model has LoRA adapters that the plan was not calibrated with"
        remedy = "unload the adapters, or calibrate a plan with them"
    elif not got:
        what = "the plan was calibrated with LoRA adapters; the model has none"
        remedy = "load, or unfuse, the plan's adapters, or calibrate a plan without them"
    else:
        what = "the model has other LoRA adapters, or another scale, than the plan's"
        remedy = "load the plan's adapters at the plan's scale, or calibrate a plan with these"
    return ConfigError(
        what,
        where="plan.model.lora",
        got=got or "no adapters",
        expected=expected or "no adapters",
        remedy=remedy,
    )


def _check_inputs(plan: Plan, found: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(set(plan.inputs) | set(found)):
        got, expected = found.get(name, "absent"), plan.inputs.get(name, "absent")
        if got != expected:
            raise _mismatch(f"inputs.{name} (shape without batch)", got, expected)


def check_sampler(plan: Plan, scheduler: Any, guidance_scale: float | None = None) -> None:
    """Raise ``ConfigError`` unless ``scheduler``, its config and the guidance are the plan's.

    Args:
        plan: the plan.
        scheduler: a diffusers scheduler.
        guidance_scale: the guidance of the generation; not checked where None.
    """
    sampler = plan.sampler
    if not sampler.scheduler:
        return
    if type(scheduler).__name__ != sampler.scheduler:
        raise _mismatch("sampler.scheduler", type(scheduler).__name__, sampler.scheduler)
    config = scheduler_config(scheduler)
    for name in sorted(set(config) | set(sampler.config)):
        got, expected = config.get(name), sampler.config.get(name)
        if got != expected:
            raise _mismatch(f"sampler.config.{name}", got, expected)
    if guidance_scale is not None and guidance_scale != sampler.guidance_scale:
        raise _mismatch("sampler.guidance_scale", guidance_scale, sampler.guidance_scale)


def check_layout(plan: Plan, found: CfgLayout) -> None:
    """Raise ``ConfigError`` unless the guidance halves come in the order of ``plan``.

    The model cannot see which half of a batch is the conditional one: a plan of the other order
    would copy the unconditional half over it.
    """
    if found is not plan.sampler.cfg_layout:
        raise _mismatch("sampler.cfg_layout", found, plan.sampler.cfg_layout)


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's configuration as JSON would read it back, private entries left out."""
    public = {
        key: str(item) if isinstance(item, float) and not math.isfinite(item) else item
        for key, item in dict(scheduler.config).items()
        if not key.startswith("_")
    }
    config: dict[str, Any] = json.loads(json.dumps(public, default=str))
    return config


def static_tensors(captured: CapturedGraph, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return those of the graph's flat inputs that are parameters and buffers."""
    pairs = zip(captured.inputs, tensors, strict=True)
    return [tensor for entry, tensor in pairs if entry.static]


def _names(sites: Sequence[tuple[str, str, int]]) -> str:
    return "; ".join(f"{name} ({kind}, {tokens} tokens)" for name, kind, tokens in sites)


def _mismatch(field: str, got: object, expected: object, remedy: str = _RECALIBRATE) -> ConfigError:
    return ConfigError(
        "the plan is for something else",
        where=f"plan.{field}",
        got=got,
        expected=expected,
        remedy=remedy,
    )
