"""What a module is set to, beside its weights: a trace follows it, so it holds for equal settings.

A setting is an attribute of a part: a flag, a number, a name, or what holds those, such as the
scale of a LoRA adapter or the processor of an attention. Tensors that a part keeps, and are no
parameters or buffers, are known by identity and writes; new ones, which a model may add for another
shape, do not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ditfastattn.runtime.writes import counted_writes

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
_SKIPPED = {  # weights, and what replaces a module's own methods
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    *("forward", "compile"),
}
_DEEP = 3  # containers in containers


class Settings:
    """Remember the settings of a module, and find what has changed."""

    def __init__(self, module: nn.Module) -> None:
        """Take them as they are now."""
        self._known = dict(_settings(module))

    def changed(self, module: nn.Module) -> str:
        """Return which setting of ``module`` is another one now, or ""."""
        now = dict(_settings(module))
        for name, value in now.items():
            if name not in self._known:
                if isinstance(value, _Held):
                    continue
                return f"the setting {name} is new"
            if not _same(self._known[name], value):
                return f"the setting {name} is {value!r}, not {self._known[name]!r}"
        gone = self._known.keys() - now.keys()
        return f"the setting {min(gone)} is gone" if gone else ""


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, part in module.named_modules():
        for name, item in vars(part).items():
            if name in _SKIPPED or name.startswith(("_ditfastattn", "_hf_hook", "_diffusers_hook")):
                continue
            yield from _values(f"{path}.{name}" if path else name, item, _DEEP)
        yield f"{path} (class)", type(part).__qualname__


def _values(name: str, item: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(item, Tensor):
        yield name, _Held(item)
    elif isinstance(item, _PLAIN):
        yield name, item
    elif isinstance(item, Mapping) and depth:
        for key, value in item.items():
            yield from _values(f"{name}.{key}", value, depth - 1)
    elif isinstance(item, (list, tuple)) and depth:
        for index, value in enumerate(item):
            yield from _values(f"{name}.{index}", value, depth - 1)
    elif not isinstance(item, nn.Module):
        yield f"{name} (class)", type(item).__qualname__
        for key, value in getattr(item, "__dict__", {}).items() if depth else ():
            yield from _values(f"{name}.{key}", value, depth - 1)


class _Held:
    """A tensor that a part keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._state = (counted_writes(tensor), tensor.data_ptr())

    def __eq__(self, other: object) -> bool:
        tensor = self._tensor()
        if not isinstance(other, _Held) or tensor is None:
            return False
        return tensor is other._tensor() and self._state == other._state

    def __hash__(self) -> int:
        return hash(self._state)

    def __repr__(self) -> str:
        return "another tensor"


def _same(known: Any, now: Any) -> bool:
    return type(known) is type(now) and (known is now or bool(known == now))
