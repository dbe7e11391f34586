"""Replace a transformer's forward, beneath what libraries have wrapped around it.

The module itself stays in its pipeline, so saving, LoRA loading and ``isinstance`` work as before.
Accelerate's offloading hooks keep the forward that they wrap as ``_old_forward``; that one is
replaced, so that moving weights is not compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from ditfastattn.core.errors import ConfigError

Forward = Callable[..., Any]
_HOOKED = "_old_forward"
_own: WeakKeyDictionary[nn.Module, Forward] = WeakKeyDictionary()
accelerated: WeakSet[nn.Module] = WeakSet()  # modules that run by a plan


def transformer_of(pipeline: Any, where: str) -> nn.Module:
    """Return the transformer of ``pipeline``, without a ``torch.compile`` around it.

    Raises:
        ConfigError: the pipeline has none.
    """
    transformer = getattr(pipeline, "transformer", None)
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
    if module in accelerated:
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


def replace_forward(module: nn.Module, make: Callable[[Forward], Forward]) -> Callable[[], None]:
    """Replace the forward of ``module`` by ``make(forward)``; return a function that undoes it.

    Replacements may nest: each is made of the model's own forward, and undone in turn.
    """
    name = _HOOKED if _HOOKED in vars(module) else "forward"
    before = vars(module).get(name)  # None where the class's own forward is in force
    known = module in _own
    made = make(_own.setdefault(module, getattr(module, name)))
    setattr(module, name, made)

    def undo() -> None:
        if not known:
            _own.pop(module, None)
        # Hooks may have come or gone meanwhile, and taken the replacement along.
        place = next((n for n in (_HOOKED, "forward") if vars(module).get(n) is made), None)
        if place is None:
            return
        if before is None and place == "forward":
            delattr(module, place)
        else:
            setattr(module, place, before or type(module).forward.__get__(module))

    return undo
