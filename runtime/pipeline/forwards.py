"""Replace a module's forward, beneath what libraries have wrapped around it, and undo it.

The module itself stays in its pipeline, so saving, LoRA loading and ``isinstance`` work as before.
Hooks of accelerate and diffusers keep the forward that they wrap; that one is replaced, so that
moving weights is not compiled. Hooks may come and go meanwhile.

A forward refers to its module, so a global table of forwards would keep every module alive, even
one with weak keys. What is known of a module is kept in the module.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.pipeline.hooks import ACCELERATE, DIFFUSERS, SPLITS_INPUTS

log = logging.getLogger(__name__)

Forward = Callable[..., Any]
_OUTERMOST = "forward"
_PLANNED = "_ditfastattn_planned_forward"  # in a module's dict, while it runs by a plan
_UNTRACED = (
    "ditfastattn has replaced this forward, and compiles what it calls; use torch.compile without "
    "fullgraph=True around it, or compile first and then call accelerate(pipeline)"
)


def _itself(item: Any) -> Any:
    return item


class ReplacedMethod:
    """Stand in an object's dict for its method ``own``; until it is undone, ``made`` is called.

    A copy of the object (deepcopy, pickle, torch.save) gets a copy of ``own``, bound to the copy:
    what was made for one object is never run for another. Dynamo does not trace it.
    """

    __slots__ = ("__dict__", "__weakref__", "_made", "_note", "own")

    def __init__(self, own: Forward, made: Forward, note: str = "") -> None:
        """Call ``made`` in place of ``own``; where it is copied, warn of ``note``."""
        functools.update_wrapper(self, own)
        self.own, self._made, self._note = own, made, note

    @torch.compiler.disable(reason=_UNTRACED)  # type: ignore[untyped-decorator, no-untyped-call]  # torch
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what was made, or the object's own method once that is undone."""
        return self._made(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """Return the own method of the copy under way."""
        self._warn()
        return copy.deepcopy(self.own, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the object's own method."""
        self._warn()
        owner = getattr(self.own, "__self__", None)
        if owner is None:
            return _itself, (self.own,)
        return getattr, (owner, self.own.__name__)  # as a bound method is pickled

    def retire(self) -> None:
        """Call the object's own method from now on, wherever a hook may have kept this."""
        self._made = self.own

    def _warn(self) -> None:
        if self._note and self._made is not self.own:
            log.warning("ditfastattn: %s", self._note)


class Replacement:
    """A forward of ``module`` that took the place of another.

    It belongs to that very module: in the dict of a copy there is None in its place.
    """

    def __init__(self, module: nn.Module, make: Callable[[Forward], Forward], note: str) -> None:
        """Replace the innermost forward of ``module`` by ``make(own)``."""
        place, name = _innermost(module)
        self._before: Forward | None = place.get(name)
        own = own_forward(module)
        self._module = module
        self.made = make(own)
        self.method = place[name] = ReplacedMethod(own, self.made, note)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a copy runs as it is."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle None: a copy runs as it is."""
        return type(None), ()

    def undo(self, module: nn.Module) -> None:
        """Put back into ``module`` what was there before, wherever hooks have taken it.

        A hook that is not known here may keep what was made: that calls the module's own forward
        from now on.
        """
        for place, name in list(_places(module)):
            if place[name] is not self.method:
                continue
            if self._before is None and place is vars(module) and name == _OUTERMOST:
                del place[name]
            else:
                place[name] = self._before or self.method.own
        if module is self._module:  # a shallow copy is undone alone
            self.method.retire()


def replace_forward(module: nn.Module, make: Callable[[Forward], Forward]) -> Callable[[], None]:
    """Replace the forward of ``module`` by ``make(forward)``; return a function that undoes it.

    Replacements may nest: each is made of the model's own forward, and undone in turn.
    """
    replacement = Replacement(module, make, "")
    return lambda: replacement.undo(module)


def plan_forward(module: nn.Module, make: Callable[[Forward], Forward]) -> None:
    """Replace the forward of ``module`` by ``make(forward)``, which runs by a plan."""
    note = (
        f"a copy of an accelerated {type(module).__name__} runs dense, with its own weights; call "
        "accelerate() with the copy's pipeline to run it by a plan"
    )
    vars(module)[_PLANNED] = Replacement(module, make, note)


def restore_forward(module: nn.Module) -> None:
    """Undo ``plan_forward``; a module that does not run by a plan is left as it is."""
    replacement: Replacement | None = vars(module).pop(_PLANNED, None)
    if replacement is not None:
        replacement.undo(module)


def planned_forward(module: nn.Module) -> Forward | None:
    """Return what ``plan_forward`` has put in place; None if ``module`` does not run by a plan."""
    replacement: Replacement | None = vars(module).get(_PLANNED)
    return None if replacement is None else replacement.made


def is_planned(module: nn.Module) -> bool:
    """Return whether ``module`` runs by a plan."""
    return vars(module).get(_PLANNED) is not None


def own_forward(module: nn.Module) -> Forward:
    """Return the forward of ``module`` itself, whatever hooks and plans are around it."""
    place, name = _innermost(module)
    known: Forward | None = place.get(name)
    return known.own if isinstance(known, ReplacedMethod) else known or module.forward


def check_not_accelerated(module: nn.Module) -> None:
    """Raise ``ConfigError`` if ``module`` runs by a plan: the model itself is to be measured."""
    if is_planned(module):
        raise ConfigError(
            "the transformer is accelerated already",
            where=type(module).__name__,
            remedy="call ditfastattn.restore(pipeline) first",
        )


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each place that holds a forward of ``module``: those within hooks first."""
    registry = vars(module).get(DIFFUSERS)
    for reference in getattr(registry, "_fn_refs", ()):
        for name in ("original_forward", _OUTERMOST):
            if vars(reference).get(name) is not None:
                yield vars(reference), name
    for name in (ACCELERATE, _OUTERMOST):
        if name in vars(module):
            yield vars(module), name


def _innermost(module: nn.Module) -> tuple[dict[str, Any], str]:
    """Return the place of the forward that is around no other one of ``module``.

    What splits a model's inputs over processes stays within: it is part of what is called.
    """
    registry: Any = vars(module).get(DIFFUSERS)
    names = getattr(registry, "_hook_order", ())
    splits = [number for number, name in enumerate(names) if name.startswith(SPLITS_INPUTS)]
    if splits:
        beyond = registry._fn_refs[splits[-1] + 1 :]
        if beyond:
            outer: dict[str, Any] = vars(beyond[0])
            return outer, "original_forward" if outer["original_forward"] else _OUTERMOST
        held = vars(module).get(ACCELERATE)
        return vars(module), ACCELERATE if _is_around(held, module) else _OUTERMOST
    found = (
        (place, name) for place, name in _places(module) if not _is_around(place[name], module)
    )
    return next(found, (vars(module), _OUTERMOST))


def _is_around(forward: Any, module: nn.Module) -> bool:
    """Return whether ``forward`` is what a hook has put around another one."""
    bound = forward.args[:1] if isinstance(forward, functools.partial) else ()
    return any(item is module for item in bound)
