"""Notice, while a model is traced, what it reads of its tensors, and the line that reads.

A read is a value that leaves the graph (``item``, ``tolist``, ``bool``), or an operator whose
result has a shape that depends on content (``nonzero``). Composite operators that hide one are
spelled out, so that only a few are left: ``x[mask]`` becomes ``x[mask.nonzero()]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode

from ditfastattn.passes.graph.ir import aten

_BY_PYTHON = {  # these read memory, and call no operator that would stand in the graph
    Tensor.tolist: "tolist()",
    Tensor.numpy: "numpy()",
    Tensor.__array__: "numpy()",
}
VALUES = (  # return a number, or a flag
    aten.item.default,
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.allclose.default,
)
SHAPES = (  # return a tensor whose shape depends on content
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
    aten._unique.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.unique_dim_consecutive.default,
    aten.one_hot.default,
)
_SKIPPED = ("/torch/", "/ditfastattn/passes/")


class HostReads(TorchFunctionMode):
    """Record reads while it is active: the node that was read, what read it, and the line."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()
        self.read: list[tuple[Node, str, str]] = []  # by Python: node, function, line
        self.lines: dict[tuple[Any, Node], str] = {}  # of operators: by target and first input

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Record what Python reads; let everything through."""
        name = _BY_PYTHON.get(func)
        node = node_of(args[0]) if name else None
        if name and node is not None:
            self.read.append((node, name, line_of_model()))
        return func(*args, **(kwargs or {}))

    @property
    def decompositions(self) -> dict[Any, Callable[..., Any]]:
        """Return how operators that read are traced: noted as they are, or spelled out."""
        noted = {target: self._noting(target) for target in (*VALUES, *SHAPES)}
        return noted | {target: self._noting(target, made) for target, made in _SPELLED.items()}

    def _noting(self, target: Any, spelled: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            for item in args:
                node = node_of(item)
                if node is not None and spelled is None:
                    self.lines.setdefault((target, node), line_of_model())
                    break
            return NotImplemented if spelled is None else spelled(*args, **kwargs)

        return run


def node_of(item: Any) -> Node | None:
    """Return the node that ``item`` stands for in the trace under way; None for constants."""
    mode = get_proxy_mode()
    if mode is None or not isinstance(item, Tensor):
        return None
    found: Any = get_proxy_slot(item, mode.tracer, None)
    return None if found is None else found.proxy.node


def line_of_model() -> str:
    """Return the line of the model's code that is running: file, number and function."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _SKIPPED):
        frame = frame.f_back
    code = frame.f_code
    file = "/".join(code.co_filename.split("/")[-2:])
    return f"{file}:{frame.f_lineno} in {code.co_name}"


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _positions(indices: Sequence[Any]) -> list[Any] | None:
    """Return ``indices`` with masks as positions; None where there is no mask."""
    if not any(map(_is_mask, indices)):
        return None
    found: list[Any] = []
    for index in indices:
        found += index.nonzero().unbind(1) if _is_mask(index) else [index]
    return found


def _index(source: Tensor, indices: Sequence[Any]) -> Any:
    found = _positions(indices)
    return NotImplemented if found is None else aten.index.Tensor(source, found)


def _index_put(target: Any) -> Callable[..., Any]:
    def run(
        source: Tensor, indices: Sequence[Any], values: Tensor, accumulate: bool = False
    ) -> Any:
        found = None if values.numel() == 1 else _positions(indices)
        return NotImplemented if found is None else target(source, found, values, accumulate)

    return run


def _masked_select(source: Tensor, mask: Tensor) -> Any:
    source, mask = torch.broadcast_tensors(source, mask)  # type: ignore[no-untyped-call]  # torch
    return aten.index.Tensor(source, list(mask.nonzero().unbind(1)))


def _repeated(
    source: Tensor, repeats: Tensor, dim: int | None = None, *, output_size: int | None = None
) -> Any:
    flat = source.flatten() if dim is None else source
    return flat.index_select(dim or 0, aten.repeat_interleave.Tensor(repeats))


def _one_hot(source: Tensor, num_classes: int = -1) -> Any:
    if num_classes < 0:  # as many as the largest one
        return NotImplemented
    classes = torch.arange(num_classes, device=source.device)
    return (source.unsqueeze(-1) == classes).to(source.dtype)


def _where(mask: Tensor) -> Any:
    return list(mask.nonzero().unbind(1))


_SPELLED: dict[Any, Callable[..., Any]] = {
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put(aten.index_put.default),
    aten.index_put_.default: _index_put(aten.index_put_.default),
    aten.masked_select.default: _masked_select,
    aten.repeat_interleave.self_Tensor: _repeated,
    aten.one_hot.default: _one_hot,
    aten.nonzero_numpy.default: _where,
    aten.where.default: _where,
    aten.argwhere.default: lambda mask: mask.nonzero(),
}
