"""Compute what a call returns from the kinds of its inputs, once per distinct call.

A kind is what operators see of a tensor besides its content: shape, dtype, device and layout. Calls
run on fake tensors of these kinds. Equal blocks of a model make equal calls, so a large graph costs
little more than one of its blocks.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from ditfastattn.passes.graph.fake_values import evaluate, fake_mode


@dataclass(frozen=True, slots=True)
class TensorKind:
    """Describe a tensor without its content."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    strides: tuple[int, ...]
    offset: int

    def agrees(self, other: object) -> bool:
        """Tell whether ``other`` is alike in all but its layout."""
        return isinstance(other, TensorKind) and (self.shape, self.dtype, self.device) == (
            other.shape,
            other.dtype,
            other.device,
        )

    def __str__(self) -> str:
        """Return the form of graph texts, with the device."""
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)} on {self.device}"


@dataclass(frozen=True, slots=True)
class Literal:
    """Hold a value that is not a tensor; its type distinguishes 1, 1.0 and True."""

    type: type
    value: Any

    def agrees(self, other: object) -> bool:
        """Tell whether ``other`` is of the same type."""
        return isinstance(other, Literal) and other.type is self.type

    def __str__(self) -> str:
        """Return the name of the type."""
        return self.type.__name__


Kind = TensorKind | Literal | tuple[Any, ...]


@dataclass(frozen=True)
class CallResult:
    """Hold the kind of a call's result, and which of its tensor arguments share its storage."""

    kind: Kind
    shared: tuple[int, ...]


def kind_of(item: Any) -> Kind:
    """Return the kind of a tensor, of any other value, or of a sequence of them."""
    if isinstance(item, Tensor):
        return TensorKind(
            tuple(item.shape), item.dtype, item.device, item.stride(), int(item.storage_offset())
        )
    if isinstance(item, (tuple, list)):
        return tuple(map(kind_of, item))
    return Literal(type(item), item)


def claimed_kind(node: Node) -> Kind:
    """Return the kind that the metadata of ``node`` claims."""
    return kind_of(node.meta["val"])


def agree(first: Kind, second: Kind) -> bool:
    """Tell whether two kinds are alike in all but layouts."""
    if isinstance(first, tuple):
        if not isinstance(second, tuple) or len(first) != len(second):
            return False
        return all(map(agree, first, second))
    return first.agrees(second)


def kind_text(kind: Kind) -> str:
    """Print a kind for people."""
    return f"[{', '.join(map(kind_text, kind))}]" if isinstance(kind, tuple) else str(kind)


def run_call(
    node: Node, kind: Callable[[Node], Kind] = claimed_kind
) -> tuple[Kind, tuple[Node, ...]]:
    """Return the kind of the result of ``node``, and the inputs whose memory it shares.

    ``kind`` gives the kinds of its inputs. An operator of higher order is taken to share the memory
    of all its inputs.
    """
    if node.target is operator.getitem:
        source: Any = node.args[0]
        parts: Any = kind(source)
        return parts[node.args[1]], (source,)
    if not isinstance(node.target, OpOverload):
        result = evaluate(node.graph, node.target, node.args, node.kwargs)
        return kind_of(result), tuple(node.all_input_nodes)
    leaves: list[Node] = []

    def frozen(item: Any) -> Kind:
        if isinstance(item, Node):
            found = kind(item)
            leaves.extend([item] * _tensors(found))
            return found
        if isinstance(item, (tuple, list)):
            return tuple(map(frozen, item))
        return Literal(type(item), item)

    args = tuple(map(frozen, node.args))
    kwargs = tuple((name, frozen(item)) for name, item in node.kwargs.items())
    result = _result(node.target, args, kwargs)
    return result.kind, tuple(dict.fromkeys(leaves[index] for index in result.shared))


def result_of(node: Node) -> Any:
    """Return the fake value of the call ``node``; calls of equal kinds share it.

    It shares no storage with the values of its inputs; see ``run_call`` for what does.
    """
    if not isinstance(node.target, OpOverload):
        if node.target is operator.getitem:
            source: Any = node.args[0]
            return source.meta["val"][node.args[1]]
        return evaluate(node.graph, node.target, node.args, node.kwargs)
    kind, _ = run_call(node)
    mode = fake_mode(node.graph)
    known = _values.setdefault(mode, {})
    if kind not in known:
        with mode:
            known[kind] = _value(kind)
    return known[kind]


_values: WeakKeyDictionary[FakeTensorMode, dict[Kind, Any]] = WeakKeyDictionary()


def _value(kind: Kind) -> Any:
    if isinstance(kind, tuple):
        return [_value(part) for part in kind]
    return kind.value if isinstance(kind, Literal) else _fake(kind)


def _tensors(kind: Kind) -> int:
    return sum(map(_tensors, kind)) if isinstance(kind, tuple) else isinstance(kind, TensorKind)


@functools.lru_cache(maxsize=1 << 14)
def _result(
    target: OpOverload, args: tuple[Kind, ...], kwargs: tuple[tuple[str, Kind], ...]
) -> CallResult:
    given: list[Tensor] = []

    def made(kind: Kind) -> Any:
        if isinstance(kind, tuple):
            return [made(part) for part in kind]
        if isinstance(kind, Literal):
            return kind.value
        given.append(_fake(kind))
        return given[-1]

    with FakeTensorMode(), torch.no_grad():
        result = target(*map(made, args), **{name: made(kind) for name, kind in kwargs})
    parts = result if isinstance(result, (tuple, list)) else [result]
    storages = {_storage(part) for part in parts if isinstance(part, Tensor)}
    shared = tuple(index for index, tensor in enumerate(given) if _storage(tensor) in storages)
    return CallResult(kind_of(result), shared)


def _fake(kind: TensorKind) -> Tensor:
    steps = zip(kind.shape, kind.strides, strict=True)
    extent = kind.offset + 1 + sum((size - 1) * stride for size, stride in steps if size)
    storage = torch.empty(extent, dtype=kind.dtype, device=kind.device)
    return storage.as_strided(kind.shape, kind.strides, kind.offset)


def _storage(tensor: Tensor) -> int:
    storage: int = tensor.untyped_storage()._cdata
    return storage
