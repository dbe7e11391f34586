"""Take quantized weights, and other tensor subclasses, as the plain tensors that they hold.

A weight that torchao has quantized is a tensor made of tensors: integers and their scales. One from
a GGUF file holds bytes, but what is computed from it is of its class again. A captured graph takes
plain tensors alone: what a subclass does is traced as operators on those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

_INERT: Any = torch._C._disabled_torch_function_impl  # of parameters, for example
_PLAIN = frozenset({Tensor, torch.nn.Parameter})

# The same object for each call: models are known by their parameters.
_bare: Any = WeakTensorKeyDictionary()


def plain_tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among ``arguments``, as a graph that was captured with them takes them."""
    arguments = list(arguments)
    if _PLAIN.issuperset(map(type, arguments)):
        return arguments
    found: list[Tensor] = []
    for item in arguments:
        if type(item) in _PLAIN:
            found.append(item)
        elif isinstance(item, Tensor):
            found += [part for _, part in parts(item)]
    return found


def parts(tensor: Tensor, name: str = "") -> list[tuple[str, Tensor]]:
    """Return the plain tensors that ``tensor``, called ``name``, is made of; itself if plain.

    A part is called by its attribute: ``to_q.weight.scale``.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return [(name, _without_subclass(tensor))]
    found: list[tuple[str, Tensor]] = []
    for attribute in tensor.__tensor_flatten__()[0]:
        found += parts(getattr(tensor, attribute), f"{name}.{attribute}")
    return found


def path_names(path: Iterable[Any]) -> list[str]:
    """Return the names and places on pytree's ``path`` to a part of the arguments."""
    return [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]


def is_plain(tensor: Tensor) -> bool:
    """Return whether a graph takes ``tensor`` itself: it is not quantized, for example."""
    return parts(tensor)[0][1] is tensor


def settings_of(tensor: Tensor) -> list[str]:
    """Return what ``tensor`` is set to beside its plain parts, as text; nothing if it is plain.

    Two weights may hold the same integers and scales, and one of them quantizes activations too.
    """
    if is_plain(tensor):
        return []
    inner: list[str] = []
    if is_traceable_wrapper_subclass(tensor):
        names, settings = tensor.__tensor_flatten__()
        inner = [text for name in names for text in settings_of(getattr(tensor, name))]
    else:
        named = vars(tensor).items()
        settings = {n: v for n, v in named if n[0] != "_" and not isinstance(v, Tensor)}
    own = re.sub(r" at 0x[0-9a-f]+", "", repr(settings))  # the same in another process
    return [f"{type(tensor).__name__} {own}", *inner]


def _without_subclass(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or a plain view of all of it where operators would return its class."""
    if type(tensor) is Tensor or type(tensor).__torch_function__ is _INERT:
        return tensor
    known: Tensor | None = _bare.get(tensor)
    with torch._C.DisableTorchFunctionSubclass():
        if known is None or known.data_ptr() != tensor.data_ptr() or known.shape != tensor.shape:
            known = _bare[tensor] = tensor.detach().as_subclass(Tensor)
    return known


def rebuilt(tensor: Tensor, plain: Iterator[Tensor]) -> Tensor:
    """Return a tensor like ``tensor`` made of the next of ``plain``, which stand for its parts."""
    if not is_traceable_wrapper_subclass(tensor):
        return next(plain)
    attributes, context = tensor.__tensor_flatten__()
    inner = {name: rebuilt(getattr(tensor, name), plain) for name in attributes}
    made: Tensor = type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return made
