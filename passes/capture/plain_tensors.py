"""Take apart tensors that are made of tensors, such as quantized weights.

A weight that torchao has quantized is a tensor subclass around integers and their scales. A
captured graph takes plain tensors alone: what the subclass does is traced as operators on those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def plain_tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among ``arguments``, as a graph that was captured with them takes them."""
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
        return [(name, tensor)]
    found: list[tuple[str, Tensor]] = []
    for attribute in tensor.__tensor_flatten__()[0]:
        found += parts(getattr(tensor, attribute), f"{name}.{attribute}")
    return found


def rebuilt(tensor: Tensor, plain: Iterator[Tensor]) -> Tensor:
    """Return a tensor like ``tensor`` made of the next of ``plain``, which stand for its parts."""
    if not is_traceable_wrapper_subclass(tensor):
        return next(plain)
    attributes, context = tensor.__tensor_flatten__()
    inner = {name: rebuilt(getattr(tensor, name), plain) for name in attributes}
    made: Tensor = type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return made
