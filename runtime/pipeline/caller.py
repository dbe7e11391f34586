"""Which pipeline calls a transformer: several may share one, as ``from_pipe`` makes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

from ditfastattn.runtime.pipeline.denoiser import plain_module

_NAMES = ("transformer", "unet")
_SECOND = "transformer_2"
_OWNERS = ("self", "components", "pipeline", "pipe")  # first arguments of what runs a pipeline


def calling_pipeline(module: nn.Module) -> Any:
    """Return the pipeline on the stack that holds ``module``, compiled or not; None if none does.

    Only the stack can tell: a call carries nothing of the pipeline that makes it.
    """
    return next((owner for owner, _ in _callers(module)), None)


def describe_call(module: nn.Module) -> str:
    """Return the call of the pipeline that calls ``module``, with what shortens its schedule."""
    owner, frame = next(_callers(module), (None, None))
    if frame is None:
        return ""
    strength = frame.f_locals.get("strength")
    given = "" if strength is None else f"strength={strength}"
    return f"{type(owner).__name__}({given})"


def local_of_call(pipeline: Any, name: str) -> Any:
    """Return what the call of ``pipeline`` under way holds by ``name``; None where none does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _owner(frame) is pipeline and (found := frame.f_locals.get(name)) is not None:
            return found
        frame = frame.f_back
    return None


def holds(pipeline: Any, module: nn.Module) -> bool:
    """Return whether ``module`` is a denoiser of ``pipeline``, compiled or not."""
    return _is_module(_held_by(pipeline), module) or is_second(pipeline, module)


def is_second(pipeline: Any, module: nn.Module | None) -> bool:
    """Return whether ``module`` is the second transformer of ``pipeline``, compiled or not."""
    return _is_module(getattr(pipeline, "__dict__", {}).get(_SECOND), module)


def _is_module(held: Any, module: nn.Module | None) -> bool:
    return isinstance(held, nn.Module) and module in (held, plain_module(held))


def _callers(module: nn.Module) -> Iterator[tuple[Any, FrameType]]:
    """Yield the pipelines on the stack that hold ``module``, from the inside out."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        owner = _owner(frame)
        if owner is not None and holds(owner, module):
            yield owner, frame
        frame = frame.f_back


def _owner(frame: FrameType) -> Any:
    """Return the first argument of what runs in ``frame``, where that may be a pipeline."""
    code = frame.f_code
    if code.co_argcount and (first := code.co_varnames[0]) in _OWNERS:
        return frame.f_locals.get(first)
    return None


def _held_by(owner: Any) -> Any:
    if isinstance(owner, nn.Module):
        return None
    known: dict[str, Any] = getattr(owner, "__dict__", {})
    return next((known[name] for name in _NAMES if known.get(name) is not None), None)
