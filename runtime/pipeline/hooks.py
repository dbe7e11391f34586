"""What libraries have hooked into a transformer, and whether a plan can run with it.

Accelerate and diffusers hook a module by putting a forward of theirs around its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ditfastattn.core.errors import ConfigError

ACCELERATE = "_old_forward"  # in a module's dict: the forward that accelerate's hook wraps
DIFFUSERS = "_diffusers_hook"  # there too: the registry of diffusers' hooks
SPLITS_INPUTS = "cp_"  # begins the names of diffusers' hooks for context parallelism

_WHOLE_STEPS = "calibrate a plan of whole steps with the hooks in place (method='whole-steps')"
_REMEDIES = {
    ACCELERATE: "use enable_model_cpu_offload() instead of enable_sequential_cpu_offload()",
    "group_offloading": "use enable_model_cpu_offload() instead of enable_group_offload()",
    "layerwise_casting": "keep the weights in the dtype that they compute in",
}


def check_not_cached(module: nn.Module) -> None:
    """Raise ``ConfigError`` if a hook of diffusers keeps what ``module`` computes between calls.

    A plan cannot account for what such hooks skip.
    """
    config = getattr(module, "_cache_config", None)
    where = f"{type(config).__name__}" if getattr(module, "is_cache_enabled", False) else ""
    found = (
        f"{name} at {part or 'the whole transformer'}"
        for part, hooks in _hooks_of_diffusers(module)
        for name, hook in hooks.items()
        if getattr(hook, "_is_stateful", False)
    )
    got = where or next(found, "")
    if got:
        raise ConfigError(
            "the transformer has a cache of its own",
            where=type(module).__name__,
            got=got,
            remedy="call disable_cache() on it first: a plan takes the cache's place",
        )


def check_parts_not_hooked(module: nn.Module) -> None:
    """Raise ``ConfigError`` if parts of ``module`` are hooked: a graph cannot hold such hooks."""
    found = [
        *((name, ACCELERATE) for name, part in module.named_modules() if ACCELERATE in vars(part)),
        *((name, hook) for name, hooks in _hooks_of_diffusers(module) for hook in hooks),
    ]
    for name, kind in found:
        if not name:
            continue  # around the whole transformer
        known = _REMEDIES.get(kind)
        raise ConfigError(
            "the transformer's weights are moved or cast part by part while it runs",
            where=type(module).__name__,
            got=f"a hook at {name}" + ("" if kind == ACCELERATE else f": {kind}"),
            expected="hooks around the whole transformer, if any",
            remedy=f"{known}, or {_WHOLE_STEPS}" if known else _WHOLE_STEPS,
        )


def check_not_hooked(module: nn.Module) -> None:
    """Raise ``ConfigError`` if parts of ``module`` are cached, moved or cast while it runs."""
    check_not_cached(module)
    check_parts_not_hooked(module)


def _hooks_of_diffusers(module: nn.Module) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each part of ``module`` that has such hooks, by name, and the hooks by theirs."""
    for name, part in module.named_modules():
        hooks: Mapping[str, Any] = getattr(vars(part).get(DIFFUSERS), "hooks", {})
        if hooks:
            yield name, hooks
