"""Describe a pipeline's guidance: its scale, and how its branches reach the transformer."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.matching import mismatch
from ditfastattn.runtime.pipeline.caller import local_of_call
from ditfastattn.runtime.pipeline.denoiser import never_called, transformer_of
from ditfastattn.runtime.pipeline.experts import SecondTransformer
from ditfastattn.runtime.pipeline.prompts import argument_of
from ditfastattn.runtime.pipeline.sampler import counting_steps

log = logging.getLogger(__name__)

Arguments = Mapping[str, Tensor]  # of one call of the transformer
_SCALE, _TRUE_SCALE = "guidance_scale", "true_cfg_scale"
_SECOND_SCALE = "guidance_scale_2"  # of a second transformer


def guidance_argument(pipeline: Any, call: Mapping[str, Any]) -> str:
    """Return the name of the pipeline's argument for the scale of classifier-free guidance.

    Pipelines of models that take a scale as an input (FLUX, QwenImage) call that input
    ``guidance_scale``, and the scale of guidance ``true_cfg_scale``.
    """
    return _scale_name(argument_of(pipeline, call, _TRUE_SCALE))


def scale_argument(pipeline: Any, call: Mapping[str, Any]) -> str:
    """Return the name of the argument that gives the scale of the transformer's guidance.

    A second transformer may have a scale of its own; without one, or where ``call`` gives only the
    first one's, that holds for both.
    """
    known = inspect.signature(pipeline.__call__).parameters
    own = isinstance(pipeline, SecondTransformer) and _SECOND_SCALE in known
    if own and (call.get(_SECOND_SCALE) is not None or _SCALE not in call):
        return _SECOND_SCALE
    return guidance_argument(pipeline, call)


def guidance_of(pipeline: Any, call: Mapping[str, Any]) -> float | None:
    """Return the scale of a generation with the arguments ``call``; None if it is not known."""
    scale = argument_of(pipeline, call, scale_argument(pipeline, call))
    if scale is None:
        scale = argument_of(pipeline, call, guidance_argument(pipeline, call))
    return scale if isinstance(scale, (int, float)) else None


def current_guidance(pipeline: Any, second: bool = False) -> float | None:
    """Return the scale of the generation under way; None if it is not known.

    Some pipelines report it, all have it among the variables of their call. One that takes two
    scales reports only one, and not which. ``second`` asks for a second transformer's.
    """
    own = local_of_call(pipeline, _SECOND_SCALE) if second else None
    if isinstance(own, (int, float)):
        return own
    true, scale = local_of_call(pipeline, _TRUE_SCALE), None
    if true is None and _TRUE_SCALE not in inspect.signature(pipeline.__call__).parameters:
        scale = getattr(pipeline, _SCALE, None)
    if scale is None:
        scale = local_of_call(pipeline, _scale_name(true))
    return scale if isinstance(scale, (int, float)) else None


def _scale_name(true: Any) -> str:
    return _SCALE if true in (None, 1.0) else _TRUE_SCALE


def check_layout(plan: Plan, found: CfgLayout) -> None:
    """Raise ``ConfigError`` unless guidance reaches the model as in ``plan``.

    The model cannot see which half of a batch is the conditional one: a plan of the other order
    would copy the unconditional half over it.
    """
    expected = plan.sampler.layouts[0]  # at the first step, where it is observed
    if found is not expected:
        raise mismatch("sampler.cfg_layout", found, expected, what="pipeline")


@dataclass(frozen=True)
class _Begun:
    """Hold a generation's first two calls, and whether the scheduler stepped between them."""

    calls: Sequence[Arguments]
    stepped: bool


class _Seen(Exception):  # noqa: N818  # it ends a generation and reports no error
    """End a generation."""


def detect_cfg_layout(
    pipeline: Any, call: Mapping[str, Any], timestep: str = "timestep"
) -> CfgLayout:
    """Begin a generation without guidance and one with it, and compare the transformer's inputs.

    Without guidance (scale 1) only the conditional branch runs. The half of the guided batch that
    holds the same conditions is the conditional one; where no half does, and a second call of the
    same step follows, guidance takes two calls: the one with the same conditions is the
    conditional one. Otherwise there is no layout.

    Args:
        pipeline: a diffusers pipeline with a ``transformer`` and an argument for guidance.
        call: the keyword arguments of a generation.
        timestep: the name of the transformer's timestep argument.

    Raises:
        ConfigError: guidance takes two calls, and neither is of the conditions.
    """
    name = guidance_argument(pipeline, call)
    if name not in inspect.signature(pipeline.__call__).parameters:
        log.info("guidance: the pipeline has no %s: share-cfg is not considered", name)
        return CfgLayout.NONE
    guided = _observe(pipeline, {**call})
    plain = _observe(pipeline, {**call, name: 1.0})
    layout = batched_layout(plain.calls[0], guided.calls[0])
    if layout is not CfgLayout.NONE:
        return layout
    if _of_one_step(plain, guided, timestep):
        return separate_layout(plain.calls[0], guided.calls, timestep)
    log.info("guidance: none, or an input of the model: share-cfg is not considered")
    return CfgLayout.NONE


def _of_one_step(plain: _Begun, guided: _Begun, timestep: str) -> bool:
    """Return whether the first two calls with guidance are of one step.

    The scheduler does not step between them, and they have the same timestep. Where a scheduler is
    not seen, and rounding gives two steps the same timestep, as the plain calls show, they must
    also agree in all else that changes from step to step.
    """
    if guided.stepped or not _agree(guided.calls, timestep):
        return False
    if plain.stepped or not _agree(plain.calls, timestep):
        return True
    first, second = plain.calls
    moving = [name for name in first if name in second and not _agree(plain.calls, name)]
    return all(_agree(guided.calls, name) for name in moving)


def _agree(calls: Sequence[Arguments], name: str) -> bool:
    return len(calls) == 2 and _same(calls[0], calls[1], name)


def batched_layout(plain: Arguments, guided: Arguments) -> CfgLayout:
    """Return which half of a ``guided`` call holds the conditions of a ``plain`` one, if any."""
    for argument, conditions in plain.items():
        layout = _compare(conditions, guided.get(argument))
        if layout is not CfgLayout.NONE:
            log.info("guidance: batched, %s (seen at the argument %s)", layout, argument)
            return layout
    return CfgLayout.NONE


def separate_layout(plain: Arguments, guided: Sequence[Arguments], timestep: str) -> CfgLayout:
    """Return which of two ``guided`` calls is of the conditions of a ``plain`` one.

    Raises:
        ConfigError: neither is.
    """
    names = [name for name in plain if name != timestep and not _agree(guided, name)]
    if any(_same(plain, guided[0], name) for name in names):
        log.info("guidance: in two calls, the conditional one first")
        return CfgLayout.SEPARATE
    if any(_same(plain, guided[1], name) for name in names):
        log.info("guidance: in two calls, the conditional one second: share-cfg is not considered")
        return CfgLayout.SEPARATE_UNCOND_FIRST
    raise ConfigError(
        "guidance calls the transformer twice a step, and for the conditions in neither call",
        where="the transformer's first two calls",
        got=f"other conditions in both ({', '.join(names)})" if names else "the same arguments",
        expected="a call of the conditions, as without guidance, and another one",
        remedy="say the order by cfg_layout, run without guidance, or batch it in one call",
    )


def _same(one: Arguments, other: Arguments, name: str) -> bool:
    first, second = one.get(name), other.get(name)
    return first is not None and second is not None and torch.equal(first, second)


def _compare(conditions: Tensor, guided: Tensor | None) -> CfgLayout:
    batch = len(conditions)
    if guided is None or len(guided) != 2 * batch or conditions.shape[1:] != guided.shape[1:]:
        return CfgLayout.NONE
    first, second = (torch.equal(half, conditions) for half in torch.split(guided, batch))
    if first == second:  # the same in both halves, like the latents: shows nothing
        return CfgLayout.NONE
    return CfgLayout.COND_FIRST if first else CfgLayout.UNCOND_FIRST


@contextmanager
def watching(denoiser: nn.Module, look: Callable[[Mapping[str, Any]], None]) -> Generator[None]:
    """Show ``look`` the arguments, by name, of each call of ``denoiser`` before it runs."""
    names = list(inspect.signature(denoiser.forward).parameters)

    def show(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(dict(zip(names, args, strict=False)) | kwargs)

    handle = denoiser.register_forward_pre_hook(show, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def copied(given: Mapping[str, Any]) -> Arguments:
    """Return copies of the tensors in what is ``given``, without those of no dimension."""
    tensors = {name: item for name, item in given.items() if isinstance(item, Tensor)}
    return {name: item.detach().clone() for name, item in tensors.items() if item.dim()}


def _observe(pipeline: Any, call: dict[str, Any]) -> _Begun:
    """Return the tensors of a generation's first two calls of the transformer; end it there."""
    seen: list[Arguments] = []
    stepped: list[int] = []

    def look(given: Mapping[str, Any]) -> None:
        seen.append(copied(given))
        stepped.append(steps())
        if len(seen) == 2:
            raise _Seen

    generator = torch.Generator().manual_seed(0)
    with (
        suppress(_Seen),
        watching(transformer_of(pipeline, "a generation"), look),
        counting_steps(pipeline) as steps,
    ):
        pipeline(**{**call, "generator": generator})
    if not seen:
        raise never_called(pipeline, "a generation")
    return _Begun(seen, stepped[-1] > stepped[0])
