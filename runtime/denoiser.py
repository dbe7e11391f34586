"""Put another forward in a transformer's place, beneath what libraries have wrapped around it.

The module itself stays in its pipeline: saving, LoRA loading and ``isinstance`` see what they did.
Accelerate's offloading hooks keep the forward they wrap as ``_old_forward``; what is replaced is
that one, so that moving weights is no part of what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import nn

from ditfastattn.errors import ConfigError

Forward = Callable[..., Any]
_HOOKED = "_old_forward"
_replaced: WeakSet[nn.Module] = WeakSet()


def transformer_of(pipeline: Any, where: str) -> nn.Module:
    """Return the denoiser of ``pipeline``, without a ``torch.compile`` around it.

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


def check_own_forward(module: nn.Module) -> None:
    """Raise ``ConfigError`` if another forward is in the place of the module's own."""
    if module in _replaced:
        raise ConfigError(
            "the transformer is accelerated, or under calibration, already",
            where=type(module).__name__,
            remedy="call ditfastattn.restore(pipeline) first",
        )


def replace_forward(module: nn.Module, make: Callable[[Forward], Forward]) -> Callable[[], None]:
    """Replace the forward of ``module`` by ``make(forward)``; return what undoes it.

    Raises:
        ConfigError: it is replaced already.
    """
    check_own_forward(module)
    _replaced.add(module)
    name = _HOOKED if _HOOKED in vars(module) else "forward"
    own = vars(module).get(name)  # None where the class's own forward is in force
    setattr(module, name, make(getattr(module, name)))
    made = vars(module)[name]

    def undo() -> None:
        _replaced.discard(module)
        # Hooks may have come or gone meanwhile, and taken the replacement along.
        place = next((n for n in (_HOOKED, "forward") if vars(module).get(n) is made), None)
        if place is None:
            return
        if own is None and place == "forward":
            delattr(module, place)
        else:
            setattr(module, place, own or type(module).forward.__get__(module))

    return undo
