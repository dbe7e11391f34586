"""Refuse a plan that does not match the model, naming the field, got and expected."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.coarse_sites import coarse_sites
from ditfastattn.passes.analysis.fingerprint import OPAQUE, Fingerprint
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import value
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.planned_site import PlannedSite
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.rewrites.split_heads import split_heads
from ditfastattn.passes.windows.window import TileWindow

log = logging.getLogger(__name__)

_RECALIBRATE = "calibrate a plan for this model and these inputs"


def input_shapes(captured: CapturedGraph) -> dict[str, tuple[int, ...]]:
    """Return the shape, without the batch, of each tensor of the model's call."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in captured.dynamic_names:
        shapes[name] = tuple(value(captured.node(name)).shape[1:])
    return dict(sorted(shapes.items()))


def rows_of(captured: CapturedGraph, tensors: Sequence[Tensor]) -> int:
    """Return how many rows a call has, whose flat inputs are ``tensors``."""
    own = [tensors[index] for index in captured.dynamic_positions if index < len(tensors)]
    return max((len(item) for item in own if item.dim()), default=0)


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


def warn_of_unsampled_change() -> None:
    """Warn that weights have changed, and a plan's fingerprint cannot tell for which it is."""
    log.warning(
        "ditfastattn: the model's weights have changed since the last generation, in elements "
        "that a plan's fingerprint does not cover: the plan may be for others"
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
    """Return those of ``sites`` that ``plan`` lists, in its order.

    Raises:
        ConfigError: the plan does not match the model, or the shapes of its inputs.
    """
    if plan.model.structure.startswith(OPAQUE):
        raise ConfigError(
            "the plan is for a model that is called as it is, not for its graph",
            where="plan.model.structure",
            got=plan.model.structure,
            remedy="run it with accelerate(pipeline, plan), or calibrate a plan of this graph",
        )
    _check_inputs(plan, captured)
    wanted = {site.name for site in plan.sites}
    chosen = tuple(site for site in sites if site.name in wanted)
    chosen = (*chosen, *holding_sites(plan.sites, captured, sites))
    recorded = [(site.name, site.kind, site.tokens) for site in plan.sites]
    found = [(site.name, site.kind, site.tokens) for site in chosen]
    if recorded != found:
        raise mismatch("sites", _names(found), _names(recorded))
    check_fingerprint(fingerprint, plan.model)
    return tuple(map(_as_planned, chosen, plan.sites))


def check_legal(
    rows: Sequence[Sequence[Strategy]], sites: Sequence[Site], layout: CfgLayout
) -> None:
    """Raise ``ConfigError`` unless ``sites`` may take the strategies ``rows[step][site]``."""
    for row in rows:
        for site, strategy in zip(sites, row, strict=True):
            reason = why_not(strategy, site, layout)
            if reason:
                raise mismatch(f"strategies ({site.name})", strategy, reason)


def holding_sites(
    planned: Sequence[PlannedSite], captured: CapturedGraph, sites: Sequence[Site]
) -> tuple[Site, ...]:
    """Return those that hold others of the ``planned`` sites; ``sites`` are all others.

    Raises:
        ConfigError: the model has no such range of blocks, or not one output.
    """
    try:
        return coarse_sites(planned, captured, sites)
    except ValueError as error:
        raise mismatch("sites", error, "the plan's ranges of blocks, and one output") from error


def _as_planned(site: Site, planned: PlannedSite) -> Site:
    """Give ``site`` the window and cache dtype of the plan; a grid must cover the site's tokens."""
    window, tokens = planned.window, site.image_tokens
    if isinstance(window, TileWindow) and window.tokens != tokens:
        grid = " x ".join(map(str, window.grid))
        raise mismatch(f"sites ({site.name}): window", f"{tokens} tokens of the image", grid)
    made = replace(site, window=window, coefficients=planned.coefficients)
    return made.with_caches_in(planned.cache_dtype)


def check_fingerprint(got: Fingerprint, expected: Fingerprint) -> None:
    """Raise ``ConfigError`` unless both are of the same model, dtype and weights.

    Both must have adapters, or neither; that they are others is warned of.
    """
    if got.structure != expected.structure:
        raise mismatch("model.structure", got.structure, expected.structure)
    if got.dtype != expected.dtype:
        raise mismatch("model.dtype", got.dtype, expected.dtype)
    if bool(got.lora) != bool(expected.lora):
        raise _lora_mismatch(got.lora, expected.lora)
    if got.lora != expected.lora:
        _warn_of_other_adapters(got.lora, expected.lora)
    if got.weights != expected.weights:
        remedy = (
            f"{_RECALIBRATE}, or give it the plan's weights again; "
            "fusing LoRA adapters changes the weights"
        )
        raise mismatch("model.weights", got.weights, expected.weights, remedy=remedy)


@functools.cache
def _warn_of_other_adapters(got: str, expected: str) -> None:
    """Warn once of adapters that were swapped: the plan still runs, as it does for other prompts.

    Adapters are exchanged as often as prompts are, and change a model as little.
    """
    log.warning(
        "ditfastattn: the model's LoRA adapters, or their scale, differ from those that the plan "
        "was calibrated with (%s, not %s): it runs, but its quality was measured with the others",
        got,
        expected,
    )


def _lora_mismatch(got: str, expected: str) -> ConfigError:
    if not expected:
        what = "the model has LoRA adapters that the plan was not calibrated with"
        remedy = "unload the adapters, or calibrate a plan with them"
    else:
        what = "the plan was calibrated with LoRA adapters; the model has none"
        remedy = "load (or unfuse) the plan's adapters, or calibrate a plan without them"
    return ConfigError(
        what,
        where="plan.model.lora",
        got=got or "no adapters",
        expected=expected or "no adapters",
        remedy=remedy,
    )


def _check_inputs(plan: Plan, captured: CapturedGraph) -> None:
    found = input_shapes(captured)
    idle = {name for name in found if not captured.node(name).users}
    for name in sorted(set(plan.inputs) | set(found)):
        got, expected = found.get(name), plan.inputs.get(name)
        unknown = expected is None and name in idle  # torch.export takes what a model leaves unused
        if got == expected or unknown or _may_be_one(name, plan.inputs, found):
            continue
        shapes = ("absent" if each is None else each for each in (got, expected))
        raise mismatch(f"inputs.{name} (shape without batch)", *shapes)


def _may_be_one(name: str, *sides: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether the one side that lacks ``name`` may have it as another argument.

    Dynamo takes arguments that are one tensor, as ``timestep`` and ``timestep_r`` can be, as one
    input; torch.export takes each.
    """
    shapes = [side[name] for side in sides if name in side]
    others = [side for side in sides if name not in side]
    return any(shape in side.values() for side in others for shape in shapes)


def static_tensors(captured: CapturedGraph, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return those of the graph's flat inputs that are parameters and buffers."""
    pairs = zip(captured.inputs, tensors, strict=True)
    return [tensor for entry, tensor in pairs if entry.static]


def _names(sites: Sequence[tuple[str, str, int]]) -> str:
    return "; ".join(f"{name} ({kind}, {tokens} tokens)" for name, kind, tokens in sites)


def mismatch(
    field: str,
    got: object,
    expected: object,
    *,
    what: str = "model",
    remedy: str = _RECALIBRATE,
) -> ConfigError:
    """Return the error for a model, or other ``what``, that differs from a ``field`` of a plan."""
    return ConfigError(
        f"the plan does not match this {what}",
        where=f"plan.{field}",
        got=got,
        expected=expected,
        remedy=remedy,
    )
