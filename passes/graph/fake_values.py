"""Fake tensors: what nodes of a graph compute, without its content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_arg


def fake_mode(graph: Graph) -> FakeTensorMode:
    """Return the fake tensor mode that the graph was captured under."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            mode: FakeTensorMode = node.meta["val"].fake_mode
            return mode
    raise LookupError("no node of the graph carries a fake tensor")


def empty_like(mode: FakeTensorMode, like: Tensor) -> Tensor:
    """Return a new fake tensor of the shape, strides, dtype and device of ``like``."""
    with mode:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def evaluate(graph: Graph, target: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the fake value of ``target(*args, **kwargs)``; nodes stand for their values."""
    with fake_mode(graph), torch.no_grad():
        return target(
            *map_arg(args, _fake_value),
            **map_arg(dict(kwargs), _fake_value),
        )


def _fake_value(node: Node) -> Any:
    """Return what ``node`` stands for: a fake value, or the graph that an operator is given."""
    if "val" in node.meta or node.op != "get_attr":
        return node.meta["val"]
    return getattr(node.graph.owning_module, str(node.target))
