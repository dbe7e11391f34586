"""A module that stays whole: one call in the graph, where its inside depends on what is denoised.

A router that sorts tokens to experts reads how many go where, so its graph differs from step to
step. The module is then called as it is, on the values of its step::

    %9 = ditfastattn.opaque_block([%x, %blocks.0.moe.experts.0.weight, ...], "moe-3")

The weights are inputs of the call, so what is kept of the module here holds none.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

_numbers = itertools.count()
_blocks: dict[str, OpaqueBlock] = {}


class OpaqueBlock:
    """A module without weights, and how it is called."""

    def __init__(self, module: nn.Module, path: str) -> None:
        """Take the ``module`` at ``path``; its code and settings are copied."""
        self.path, self.name = path, f"{path}-{next(_numbers)}"
        named = dict([*module.named_parameters(), *module.named_buffers()])
        self.names = tuple(named)
        memo: dict[int, Any] = {id(item): _weightless(item) for item in named.values()}
        self._module = copy.deepcopy(module, memo)
        self._leaves: list[Any] = []
        self._structure: Any = None
        self._returned: Any = None
        self.inputs: list[Tensor] = []  # without content, weights among them
        self.results: list[Tensor] = []  # likewise
        _blocks[self.name] = self

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call ``module`` through the operator, as the trace sees it."""
        leaves, self._structure = pytree.tree_flatten((args, kwargs))
        given = [item for item in leaves if isinstance(item, Tensor)]
        self._leaves = [None if isinstance(item, Tensor) else (item,) for item in leaves]
        own = dict([*module.named_parameters(), *module.named_buffers()])
        results = opaque_block([*given, *(own[name] for name in self.names)], self.name)
        return pytree.tree_unflatten(results, self._returned)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return what the module computes of the call's tensors, with the weights that follow."""
        given = iter(tensors)
        leaves = [next(given) if held is None else held[0] for held in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        weights = dict(zip(self.names, given, strict=True))
        with torch.no_grad():
            result = functional_call(self._module, weights, args, kwargs)
        results, self._returned = pytree.tree_flatten(result)
        self.inputs = [_weightless(item) for item in tensors]
        self.results = [_weightless(item) for item in results]
        storages = {item.untyped_storage()._cdata for item in tensors}
        return [
            item.clone() if item.untyped_storage()._cdata in storages else item for item in results
        ]


def block_named(name: str) -> OpaqueBlock:
    """Return the block that a call in a graph names."""
    return _blocks[name]


def _weightless(item: Tensor) -> Tensor:
    made = torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(item, nn.Parameter) else made


@torch.library.custom_op("ditfastattn::opaque_block", mutates_args=())
def opaque_block(tensors: list[Tensor], block: str) -> list[Tensor]:
    """Run the module that is kept as ``block``."""
    return _blocks[block].run(tensors)


OPAQUE_BLOCK = torch.ops.ditfastattn.opaque_block.default


@opaque_block.register_fake
def _(tensors: list[Tensor], block: str) -> list[Tensor]:
    device = tensors[0].device
    return [
        torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device=device)
        for item in _blocks[block].results
    ]
