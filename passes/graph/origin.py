"""Read off a node which module it came from, and whether it is a parameter or buffer."""

from __future__ import annotations

import re

from torch.fx import Node

_STATIC = "_dynamo_static_input_type"  # in a placeholder's meta["tensor_dict"], as Dynamo marks it
_PLAIN_PATH = re.compile(r"[\w.]*")
_PEFT_WRAPPER = "base_model.model."  # plans name modules by their paths without it


def mark_static(placeholder: Node) -> None:
    """Mark an input as a parameter or buffer of the model."""
    placeholder.meta["tensor_dict"] = {_STATIC: "unguarded"}


def is_marked_static(placeholder: Node) -> bool:
    """Return whether an input is marked as a parameter or buffer of the model."""
    return _STATIC in (placeholder.meta.get("tensor_dict") or {})


def is_static(node: Node) -> bool:
    """Return whether ``node`` is a parameter, a buffer or a constant."""
    return node.op == "get_attr" or is_marked_static(node)


def readable_path(source: str) -> str:
    """Shorten Dynamo's spelling: ``L['self']._modules['blocks'].0.attn`` -> ``blocks.0.attn``.

    Paths from torch.export are plain already.
    """
    if _PLAIN_PATH.fullmatch(source):
        return source.removeprefix(_PEFT_WRAPPER)
    path = re.sub(r"\.(_old_)?forward\.__self__", "", source)  # a method that a hook put there
    path = re.sub(r"\.?__dict__|\.?\[?'?_(modules|parameters|buffers)'?\]?(?=[\[.])", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    parts = [part for part in path.split(".") if part]
    readable = ".".join(part for part in parts[1:] if part != "self")
    return readable.removeprefix(_PEFT_WRAPPER) or source


def module_path(node: Node) -> str:
    """Return the path of the innermost module that ``node`` came from, or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return readable_path(paths[-1]) if paths else ""
