"""Replace a transformer's forward, beneath what libraries have wrapped around it.

The module itself stays in its pipeline, so saving, LoRA loading and ``isinstance`` work as before.
Accelerate's offloading hooks keep the forward that they wrap as ``_old_forward``; that one is
replaced, so that moving weights is not compiled.

A forward refers to its module, so a global table of forwards would keep every module alive, even
one with weak keys. What is known of a module is kept in the module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ditfastattn.core.errors import ConfigError

Forward = Callable[..., Any]
_HOOKED = "_old_forward"
_OWN = "_ditfastattn_own_forward"  # in a module's dict, while its forward is replaced
_PLANNED = "_ditfastattn_planned_forward"  # there too, while it runs by a plan


def denoiser_name(pipeline: Any) -> str:
    """Return what ``pipeline`` calls its denoiser: a transformer, or a U-Net."""
    unet = isinstance(getattr(pipeline, "unet", None), nn.Module)
    transformer = isinstance(getattr(pipeline, "transformer", None), nn.Module)
    return "unet" if unet and not transformer else "transformer"


def transformer_of(pipeline: Any, where: str) -> nn.Module:
    """Return the denoiser of ``pipeline``, without a ``torch.compile`` around it.

    Raises:
        ConfigError: the pipeline has none.
    """
    transformer = getattr(pipeline, denoiser_name(pipeline), None)
    if not isinstance(transformer, nn.Module):
        raise ConfigError(
            "the pipeline has no transformer",
            where=where,
            got=type(pipeline).__name__,
            expected="a diffusers pipeline with a `transformer` module",
        )
    plain: nn.Module = getattr(transformer, "_orig_mod", transformer)
    return plain


def check_not_accelerated(module: nn.Module) -> None:
    """Raise ``ConfigError`` if ``module`` runs by a plan: the model itself is to be measured."""
    if _PLANNED in vars(module):
        raise ConfigError(
            "the transformer is accelerated already",
            where=type(module).__name__,
            remedy="call ditfastattn.restore(pipeline) first",
        )


def check_not_hooked(module: nn.Module) -> None:
    """Raise ``ConfigError`` if parts of ``module`` are cached, or moved, while it runs.

    A plan cannot account for what diffusers caches, and a graph cannot hold such hooks.
    """
    if getattr(module, "is_cache_enabled", False):
        raise ConfigError(
            "the transformer has a cache of its own",
            where=type(module).__name__,
            got=type(getattr(module, "_cache_config", None)).__name__,
            remedy="call disable_cache() on it first: a plan takes the cache's place",
        )
    parts = (name for name, part in module.named_modules() if name and _HOOKED in vars(part))
    for name in parts:
        raise ConfigError(
            "the transformer's weights are moved part by part while it runs",
            where=type(module).__name__,
            got=f"a hook at {name}",
            expected="hooks around the whole transformer, if any",
            remedy="use enable_model_cpu_offload() instead of enable_sequential_cpu_offload()",
        )


@dataclass(frozen=True)
class Replacement:
    """A forward that took the place of another; what was there ``before``, None for the class's."""

    made: Forward
    before: Forward | None
    nested: bool

    def undo(self, module: nn.Module) -> None:
        """Put back into ``module`` what was there before."""
        if not self.nested:
            vars(module).pop(_OWN, None)
        # Hooks may have come or gone meanwhile, and taken the replacement along.
        names = (_HOOKED, "forward")
        place = next((name for name in names if vars(module).get(name) is self.made), None)
        if place is None:
            return
        if self.before is None and place == "forward":
            delattr(module, place)
        else:
            setattr(module, place, self.before or type(module).forward.__get__(module))


def replace_forward(module: nn.Module, make: Callable[[Forward], Forward]) -> Callable[[], None]:
    """Replace the forward of ``module`` by ``make(forward)``; return a function that undoes it.

    Replacements may nest: each is made of the model's own forward, and undone in turn.
    """
    replacement = _replace(module, make)
    return lambda: replacement.undo(module)


def plan_forward(module: nn.Module, make: Callable[[Forward], Forward]) -> None:
    """Replace the forward of ``module`` by ``make(forward)``, which runs by a plan."""
    vars(module)[_PLANNED] = _replace(module, make)


def restore_forward(module: nn.Module) -> None:
    """Undo ``plan_forward``; a module that does not run by a plan is left as it is."""
    replacement: Replacement | None = vars(module).pop(_PLANNED, None)
    if replacement is not None:
        replacement.undo(module)


def _replace(module: nn.Module, make: Callable[[Forward], Forward]) -> Replacement:
    name = _HOOKED if _HOOKED in vars(module) else "forward"
    before = vars(module).get(name)
    nested = _OWN in vars(module)
    own = vars(module).setdefault(_OWN, getattr(module, name))
    made = make(own)
    setattr(module, name, made)
    return Replacement(made, before, nested)
